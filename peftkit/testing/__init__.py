"""The public conformance kit: checks(method) gives the laws that a method's declarations call for; BACKBONES runs them."""

from peftkit.testing.backbones import BACKBONES, Backbone
from peftkit.testing.checks import Check, checks
from peftkit.testing.subject import Refused, registered

__all__ = ["BACKBONES", "Backbone", "Check", "Refused", "checks", "registered"]
