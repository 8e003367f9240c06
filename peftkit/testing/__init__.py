"""The public conformance kit: checks(method) gives the laws that a method declares; BACKBONES are what they run on."""

from peftkit.testing.backbones import BACKBONES, Backbone
from peftkit.testing.checks import Check, checks
from peftkit.testing.subject import Refused, registered

__all__ = ["BACKBONES", "Backbone", "Check", "Refused", "checks", "registered"]
