"""What the task vectors look like: sizes, directions, signs, spectra, and what a merge kept of them."""
