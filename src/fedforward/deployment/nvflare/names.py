"""What the processes of a run on FLARE must call alike. Imports no FLARE, which is large."""

import re

#: The name of a task, and the entry of its data object that holds the envelope.
TASK, KEY = "envelope", "envelope"
#: Environment variable with the run's folder, where `fedforward server` has started FLARE.
RUN = "FEDFORWARD_RUN"
#: Environment variable with the socket of a model server that runs already.
SOCKET = "FEDFORWARD_SOCKET"
#: Environment variable with the path of `site.toml`, instead of the one in `local`.
SITE = "FEDFORWARD_SITE"
#: The file with the configuration, in the job's `config` folder.
RUN_TOML = "run.toml"
#: What a run may be called: it becomes the name of a folder, and of a job.
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
#: What the coordinator says where FLARE, or its operator, ends the job.
ABORTED = "FLARE has aborted the job. Everything up to here is kept; submit it again to go on."
