"""Causal and off-policy estimators, weights of environments, and metrics of grouped answers.

Estimators raise ValueError for values out of range, also on a GPU. Weights of losses (`vrex_weights`, `irm_penalty`,
`tempered_group_weights`) check values on the CPU, and on other devices only with TOKFUSE_CHECK=1.
"""

from tokfuse.algorithms.causal.answer_metrics import best_of_n as best_of_n
from tokfuse.algorithms.causal.answer_metrics import majority_at_k as majority_at_k
from tokfuse.algorithms.causal.answer_metrics import pass_rate_at_k as pass_rate_at_k
from tokfuse.algorithms.causal.effects import ablation_effect as ablation_effect
from tokfuse.algorithms.causal.effects import pns_bounds as pns_bounds
from tokfuse.algorithms.causal.environments import GroupDRO as GroupDRO
from tokfuse.algorithms.causal.environments import irm_penalty as irm_penalty
from tokfuse.algorithms.causal.environments import vrex_weights as vrex_weights
from tokfuse.algorithms.causal.offpolicy import tempered_group_weights as tempered_group_weights
