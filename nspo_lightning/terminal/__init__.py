"""What a person sees while something long is under way."""

from nspo_lightning.terminal.counted import counted as counted
from nspo_lightning.terminal.percent import percent as percent
from nspo_lightning.terminal.progress import Advance as Advance
from nspo_lightning.terminal.progress import rows_progress as rows_progress
from nspo_lightning.terminal.shortened import shortened as shortened
from nspo_lightning.terminal.spans import clock_time as clock_time
from nspo_lightning.terminal.spans import duration as duration
