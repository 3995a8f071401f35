"""Scores, intervals and verdicts from probabilities.

scikit-learn and SciPy are imported inside the functions that use them: the import takes a second, which a stage that
fails early should not.
"""
