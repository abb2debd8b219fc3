"""Error types and the one message template.

`<op>: <argument> must be <requirement>; got <actual>. <next step>.`
"""


class BackendUnavailable(RuntimeError):
    """No backend, or not the forced one, can run this call; the message lists each one's reason."""


def refuse(op: str, argument: str, requirement: str, actual: object, next_step: str) -> ValueError:
    """Build the `ValueError` of the template above; the caller raises it."""
    return ValueError(f"{op}: {argument} must be {requirement}; got {actual}. {next_step}")
