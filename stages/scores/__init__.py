"""From probabilities to numbers and a verdict."""
