# SPDX-License-Identifier: Apache-2.0
"""Errors a user can act on."""


class GlimpseError(ValueError):
    """Something the caller gave cannot be used; the message names what was expected and what was found."""


class CheckpointError(GlimpseError):
    """A checkpoint or module folder does not hold what its config promises."""


class UnsupportedOptionError(GlimpseError):
    """An option is valid elsewhere but cannot be honoured by this engine; nothing was computed."""
