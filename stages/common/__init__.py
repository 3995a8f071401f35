"""What every script is built on."""
