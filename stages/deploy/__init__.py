"""The finished network: from an image to probabilities, exported, described and served."""
