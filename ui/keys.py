"""The keys of the workbench, as they are listed. What they do is in assets/workbench.js and assets/plot.js."""

KEYS = (
    ("1 … 6", "Open a page"),
    ("Ctrl+Enter", "Do the main thing of the page; in the recipe's text: apply it"),
    ("Ctrl+Z", "Undo the last change of the recipe"),
    ("Ctrl+Shift+Z", "Redo it"),
    ("Arrow keys", "Move in a chart; Enter chooses"),
    ("Esc", "Stop the job that is running, after a question"),
    ("?", "This list"),
)
