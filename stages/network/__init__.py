"""What is trained, and how it is stored."""
