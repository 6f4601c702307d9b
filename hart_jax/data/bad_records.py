"""Records that do not decode: each is named once, and too many of them are an error."""

import sys
from collections.abc import Callable

from tqdm import tqdm

from hart_jax.errors import UserError


class BadRecords:
    """Those found since the start of this process.

    Args:
      name_of: number of a record -> what to call it.
      limit: how many different ones there may be.
      consequence: what happens to each, for the warning.
    """

    def __init__(self, name_of: Callable[[int], str], limit: int, consequence: str):
        self._name_of, self._limit, self._consequence = name_of, limit, consequence
        self._names: dict[int, str] = {}

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(self._names)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names.values())

    def add(self, number: int) -> None:
        """Warns on stderr if it is a new one.

        Raises:
          UserError: naming some, when there are more than the limit.
        """
        if number in self._names:
            return
        self._names[number] = self._name_of(number)
        count, limit = len(self._names), self._limit
        if count > limit:
            raise UserError(
                f"{count} records do not decode, more than max_bad_records={limit}: {', '.join(self.names[:10])}"
                f"{', ...' if count > 10 else ''}; write the shards anew without them, or raise the limit"
            )
        so_far = f"{count} so far, {limit} allowed"
        message = f"warning: record {self._names[number]} does not decode, {self._consequence} ({so_far})"
        # Above a progress bar, where there is one.
        tqdm.write(message, file=sys.stderr)
