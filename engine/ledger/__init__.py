"""Where the device's time went: every second to a class and, if it was work, to a request. docs/cost.md defines it."""

from engine.ledger.ledger import CLASSES, Ledger, ended, joined
from engine.ledger.roofline import Roofline, calibrate

__all__ = ["CLASSES", "Ledger", "Roofline", "calibrate", "ended", "joined"]
