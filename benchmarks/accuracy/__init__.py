"""Accuracy of visual-token reduction on models small enough to train here.

`data` draws scenes and asks about them, `models` builds a small LLaVA, `train` trains it.
"""
