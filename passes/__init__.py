"""Rewrite passes, one per file. The table below is the registry: name to import path, loaded when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.passes.base import Pass

PASSES: dict[str, str] = {
    "remove-noops": "graphopt.passes.remove_noops:RemoveNoops",
    "fold-constants": "graphopt.passes.fold_constants:FoldConstants",
    "fold-batch-norm": "graphopt.passes.fold_batch_norm:FoldBatchNorm",
    "detect-sparsity": "graphopt.passes.detect_sparsity:DetectSparsity",
    "eliminate-common-subexpressions": (
        "graphopt.passes.eliminate_common_subexpressions:EliminateCommonSubexpressions"
    ),
    "eliminate-dead-code": "graphopt.passes.eliminate_dead_code:EliminateDeadCode",
    "prune": "graphopt.passes.prune:Prune",
    "prune-channels": "graphopt.passes.prune_channels:PruneChannels",
    "prune-neurons": "graphopt.passes.prune_neurons:PruneNeurons",
    "prune-heads": "graphopt.passes.prune_heads:PruneHeads",
    "reduce-query-heads": "graphopt.passes.reduce_query_heads:ReduceQueryHeads",
    "pool-kv-heads": "graphopt.passes.pool_kv_heads:PoolKvHeads",
    "prune-head-dims": "graphopt.passes.prune_head_dims:PruneHeadDims",
    "prune-embeddings": "graphopt.passes.prune_embeddings:PruneEmbeddings",
    "nvit": "graphopt.passes.nvit:Nvit",
    "optin": "graphopt.passes.optin:Optin",
    "factor-low-rank": "graphopt.passes.factor_low_rank:FactorLowRank",
    "merge-factors": "graphopt.passes.merge_factors:MergeFactors",
    "factor-block-diagonal": "graphopt.passes.factor_block_diagonal:FactorBlockDiagonal",
    "sparsify-magnitude": "graphopt.passes.sparsify_magnitude:SparsifyMagnitude",
    "sparsify-wanda": "graphopt.passes.sparsify_wanda:SparsifyWanda",
    "sparsify-sparsegpt": "graphopt.passes.sparsify_sparsegpt:SparsifySparsegpt",
    "sparsify-nm": "graphopt.passes.sparsify_nm:SparsifyNm",
    "sparsify-blocks": "graphopt.passes.sparsify_blocks:SparsifyBlocks",
    "sparsify-patterns": "graphopt.passes.sparsify_patterns:SparsifyPatterns",
    "drop-blocks": "graphopt.passes.drop_blocks:DropBlocks",
    "prune-tokens": "graphopt.passes.prune_tokens:PruneTokens",
    "merge-tokens": "graphopt.passes.merge_tokens:MergeTokens",
    "diffrate": "graphopt.passes.diffrate:Diffrate",
    "transform-tokens": "graphopt.passes.transform_tokens:TransformTokens",
    "pyramid-drop": "graphopt.passes.pyramid_drop:PyramidDrop",
    "visiondrop": "graphopt.passes.visiondrop:Visiondrop",
    "aim": "graphopt.passes.aim:Aim",
    "lvlm-csp": "graphopt.passes.lvlm_csp:LvlmCsp",
    "adatoken": "graphopt.passes.adatoken:Adatoken",
    "core-matching": "graphopt.passes.core_matching:CoreMatching",
    "drop-segments": "graphopt.passes.drop_segments:DropSegments",
    "flexdit": "graphopt.passes.flexdit:Flexdit",
    "semantic-tokens": "graphopt.passes.semantic_tokens:SemanticTokens",
    "prune-scan-tokens": "graphopt.passes.prune_scan_tokens:PruneScanTokens",
    "merge-experts": "graphopt.passes.merge_experts:MergeExperts",
    "decompose-experts": "graphopt.passes.decompose_experts:DecomposeExperts",
}

# Lossless, and on by default. Read from top to bottom.
CANONICALISE: tuple[str, ...] = (
    "remove-noops",  # nothing stands between what belongs together
    "fold-constants",  # masks, position ids, rotary tables, converted weights
    "fold-batch-norm",  # into the convolution or linear layer next to it
    "detect-sparsity",  # in the weights as they are now
    "eliminate-common-subexpressions",
    "eliminate-dead-code",  # last: what the others left behind
)

# What axis inference wants done first. Batch norms stay: their scales are a criterion.
PREPARE: tuple[str, ...] = ("remove-noops", "fold-constants", "eliminate-dead-code")


def load(name: str) -> type[Pass]:
    """The class of a registered pass. Raises KeyError where there is none."""
    module, _, attribute = PASSES[name].partition(":")
    return getattr(import_module(module), attribute)


def make(name: str, **options: Any) -> Pass:
    """A registered pass with its options. Raises KeyError for an unknown name, TypeError for an unknown option."""
    return load(name)(**options)
