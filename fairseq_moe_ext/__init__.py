"""Mixture-of-Experts language models as a plugin of stock fairseq.

`--user-dir` imports this package. Importing it registers the models, the criteria and the tasks
with fairseq, and wraps the functions of fairseq that patches/ lists. README.md has the map of the
code.
"""

import fairseq_today

fairseq_today.apply()  # before anything imports fairseq

from fairseq_today import registry  # noqa: E402

from . import criterions, optim, patches  # noqa: E402, F401
from .models import architectures, language_model  # noqa: E402, F401
from .tasks import mixture_language_modeling, multiple_choice  # noqa: E402, F401

registry.apply(patches.PATCHES)
