"""What a person sees. Thin: asks ``merging``, draws, never computes on weights."""
