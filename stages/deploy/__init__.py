"""The finished network: prediction, export, model card, web pages; suggestions of images to label."""
