"""Merging a model larger than memory: safetensors in, safetensors out, tensor by tensor, for every mergeable method."""

from peftkit.shards.verbs import ShardPlan, merge_shards, plan_shards

__all__ = ["ShardPlan", "merge_shards", "plan_shards"]
