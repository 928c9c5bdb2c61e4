"""Libraries kept from talking about themselves: their progress bars, and what they plan for their own future."""

from __future__ import annotations


def quiet(errors_alone: bool = False) -> None:
    """For the whole process. errors_alone: transformers' warnings too, where standard error is for errors."""
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore", FutureWarning)  # between libraries, nothing that a user can act on
    logging.disable_progress_bar()
    if errors_alone:
        logging.set_verbosity_error()
