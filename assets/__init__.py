"""What ships with Amalgam besides code: real experts to merge, their tasks, and the scripts that made them."""
