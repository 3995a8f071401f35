"""One phase of training, and what makes it fast."""
