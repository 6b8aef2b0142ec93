"""How a worker ends when it was not bad input and not done: its exit code says whether to start it again."""

GAVE_UP = 3  # to start again would end the same way
REQUEUE = 75  # it was asked to end, has saved where it could, and wants to be started again (EX_TEMPFAIL)


class Ended(Exception):
    """A run ends, and one line says why. `code`: of the worker's exit."""

    def __init__(self, line: str, code: int = 1) -> None:
        super().__init__(line)
        self.code = code


class Diverged(Ended, FloatingPointError):
    """Too many steps in a row were not finite; all ranks found it at the same step."""


class Preempted(Ended):
    """All ranks agreed to end at a step boundary, have saved and have said so."""

    def __init__(self) -> None:
        super().__init__("", REQUEUE)
