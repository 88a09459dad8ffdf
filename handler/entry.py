"""The module TorchServe loads from the root of an archive. It hands everything on to `handler.service`.

It imports the standard library alone, so that importing it cannot fail: TorchServe hides the cause of an ImportError
behind "No module named ts.torch_handler…". What goes wrong later is written to stderr in full.
"""

import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

# Marks the line on stderr that says why a worker did not load; scripts/serve looks for it in the log.
LOAD_FAILED = "MARBLE_LOAD_FAILED"


class Entry:
    """What TorchServe calls: `initialize` once in each worker, then `handle` for each batch."""

    def initialize(self, context: Any) -> None:
        """Loads the model. Raises, after saying why on stderr, if it cannot be loaded or does not answer rightly."""
        try:
            from handler.service import Service

            self._service = Service(context)
        except Exception as error:
            failure = {"model": context.model_name, "error": f"{type(error).__name__}: {error}"}
            print(f"{traceback.format_exc()}{LOAD_FAILED} {json.dumps(failure)}", file=sys.stderr, flush=True)
            raise

    def handle(self, rows: Sequence[Mapping[str, Any]], context: Any) -> list[bytes]:
        """Answers one batch: one body per row, in order."""
        return self._service.handle(rows, context)
