"""Error types and the message template.

`<op>: <argument> must be <requirement>; got <actual>. <next step>.`
"""


class BackendUnavailable(RuntimeError):
    """Error of a call that no backend, or not the forced backend, can run. The message lists every reason."""


def refuse(op: str, argument: str, requirement: str, actual: object, next_step: str) -> ValueError:
    """Return a `ValueError` with the message template of this module. The caller raises it."""
    return ValueError(f"{op}: {argument} must be {requirement}; got {actual}. {next_step}")
