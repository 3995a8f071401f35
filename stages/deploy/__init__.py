"""The finished network: from an image to probabilities, exported, described and served; and a page to review labels."""
