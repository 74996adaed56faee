"""Hyperparameter search: ``Tuner`` runs a Module as it is trained alone, over a space of hyperparameters. Floor 6."""

from raylit.search.tuner import Tuner

__all__ = ["Tuner"]
