"""Small models of every kind for Hugging Face transformers, and how they are loaded."""

from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

TEXT = "the cat sat on the mat\nand saw a dog\n\né 木 a cat <s> 12 \t\n" * 20
MOE = "--moe-freq 2 --moe-expert-count 4"
KINDS = {
    "xglm": "--moe-freq 0 --share-decoder-input-output-embed",
    "dense": "--moe-freq 0 --decoder-learned-pos --layernorm-embedding --no-decoder-final-norm",
    "twin": f"{MOE} --moe-dense-twin --no-scale-embedding",
    "top2": f"{MOE} --share-decoder-input-output-embed --moe-gating-use-fp32",
    "top1": f"{MOE} --moe-top-k 1 --no-token-positional-embeddings --activation-fn relu",
    "top3": f"{MOE} --moe-top-k 3 --moe-score sigmoid --moe-route-scale 1.5 --moe-first-dense 0",
    "groups": "--moe-layers 0 --moe-expert-count 8 --moe-groups 4 --moe-top-groups 2",
    "kinds": f"{MOE} --moe-shared-experts 2 --moe-latent-dim 8 --activation-fn swiglu "
    "--moe-expert-ffn-dim 12 --moe-gating-fp32-product",
    "null": f"{MOE} --moe-null-experts 3 --moe-top-k 3",
    "bias": f"{MOE} --moe-balance both --moe-bias-update-rate 0.05 "
    "--moe-score sigmoid --moe-second-expert-policy all",
    **{
        router: f"{MOE} --moe-router {router}"
        for router in ("sinkhorn", "base", "hash", "threshold", "relu", "random")
    },
}


def ours(path):
    return MoETransformerLanguageModel.from_pretrained(str(path.parent), path.name).eval()


def theirs(folder, **settings):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **settings
    ).eval()


def tokenizer_of(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
