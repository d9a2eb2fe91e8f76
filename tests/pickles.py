"""What nobody wants in a checkpoint."""


class RunsCode:
    """Once pickled, loading it calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call
