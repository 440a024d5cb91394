"""Attacks: what is done to prompts, to the beginning of answers and to decoding, to see what a policy then says."""

from nspo_lightning.attacks.decoding import Decoding
from nspo_lightning.attacks.gcg import GCG
from nspo_lightning.attacks.many_shot import ManyShot
from nspo_lightning.attacks.pair import Pair
from nspo_lightning.attacks.prefill import Prefill
from nspo_lightning.attacks.protocol import ATTACK, LOOKALIKES, Attack, AttackError, AttackRow, Victim
from nspo_lightning.attacks.registry import data_attacks, find_attacks, groups, is_template_file
from nspo_lightning.attacks.templates import Template

__all__ = [
    "ATTACK",
    "GCG",
    "LOOKALIKES",
    "Attack",
    "AttackError",
    "AttackRow",
    "Decoding",
    "ManyShot",
    "Pair",
    "Prefill",
    "Template",
    "Victim",
    "data_attacks",
    "find_attacks",
    "groups",
    "is_template_file",
]
