"""Text and models for calibration: texts without labels, strictly read, and networks to send them through."""
