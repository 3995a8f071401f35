"""From probabilities to numbers and a verdict.

scikit-learn and SciPy are imported by the functions that use them: that takes a second, which a stage that has nothing
to do yet, or stops at a wrong file, need not wait for.
"""
