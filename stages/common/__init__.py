"""What every script stands on."""
