"""What every script uses."""
