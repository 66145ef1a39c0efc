"""Every setting, with its unit and the meaning of 0 and null under it.

Config stops at the builders (``launch/``, ``tools/`` and the ``job`` modules): inner code takes plain arguments.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

from trsr_dist.config.kinds import (
    DISTINCT,
    NO_THOUGHTS,
    Beta,
    FilePath,
    Modules,
    OnResume,
    Role,
    StorePath,
    TemplateVariables,
)

PROMPTLESS = ("none", "raw")
"""Schemes that ask no engine for anything, whatever ``summarize.engine`` says."""


class Section(BaseModel):
    """Settings are frozen; unknown keys, infinities and NaN are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class RunSection(Section):
    dir: FilePath = Field("runs/default", min_length=1)
    """Folder of this run: everything the stages write lies below it."""
    seed: int = Field(0, ge=0)
    """Fixes data order, negatives, splits of ties, dropout and sampling."""
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], DISTINCT] = ("tensorboard",)
    """Where scalars, figures, settings and final metrics of summarize, train and evaluate go, beside metrics.jsonl. All
    but the first are extras; keys and addresses come from WANDB_API_KEY, MLFLOW_TRACKING_URI and the like."""
    tensorboard: bool = True
    """False leaves tensorboard out of run.trackers."""


class DemoSection(Section):
    num_users: int = Field(5000, ge=20)
    """Users the generator writes (data.format: demo)."""
    num_items: int = Field(1000, ge=100)
    """News items the generator writes."""


class DataSection(Section):
    format: Literal["mind", "amazon_m2", "jsonl", "table", "recbole", "amazon_reviews", "demo"] = "mind"
    """Layout of the raw files. table: interactions.* and items.* as CSV, TSV, Parquet or JSON lines, told by the
    ending; recbole: atomic files; amazon_reviews: a category of Amazon Reviews 2023 (reviews and meta_*); demo
    writes a small data set in MIND's layout first."""
    path: StorePath = ""
    """Folder with the raw files; one in a store (s3://, gs://, hf://, https://) is copied to RUN/raw first. Ignored by
    demo, which writes RUN/raw."""
    domain: Literal["auto", "news", "products", "items"] = "auto"
    """Wording of the prompts; auto: news for mind and demo, products for amazon_m2 and amazon_reviews,
    items for the others."""
    behaviors_file: FilePath = "behaviors.tsv"
    """MIND: name of the behaviours file in data.path."""
    items_file: FilePath = ""
    """Name of the item file; empty: the format's own (news.tsv, products_train.csv, items.jsonl)."""
    sessions_file: FilePath = "sessions_train.csv"
    """Amazon-M2: name of the sessions file."""
    interactions_file: FilePath = ""
    """table, jsonl, recbole, amazon_reviews: name of the interactions file; empty: the format's own. Its ending tells
    how it is read."""
    columns: dict[Role, str] = {}
    """table, jsonl, recbole, amazon_reviews: names in the files of user, item, time, history, target, shown and
    candidates, and of an item's id and category, where they have others: {user: customer, item: sku, id: sku}."""
    locale: str = ""
    """Amazon-M2: keep only this locale (the paper: UK); empty keeps all, with negatives of the target's locale."""
    time_format: str = ""
    """table, jsonl, recbole, amazon_reviews: form of times that are text, as Python's strptime reads it
    ('%d.%m.%Y %H:%M'; UTC without %z); empty: numbers, ISO 8601, and the formats of ctime, RFC 2822 and Goodreads."""
    item_fields: Annotated[tuple[str, ...], DISTINCT] = ()
    """Fields that make an item's text, in order; empty: the format's default (MIND: category, subcategory, title)."""
    target: Literal["last", "impression"] = "last"
    """MIND: the last click of the history (the paper), or the clicked impressions."""
    min_history: int = Field(1, ge=1)
    """Users with fewer items before the target are skipped and counted."""
    max_history: int = Field(0, ge=0)
    """Users with more items before the target are skipped and counted (or cut, see long_histories); 0: no limit."""
    long_histories: Literal["skip", "cut"] = "skip"
    """What happens to users above max_history: skip them (the paper) or keep their latest items."""
    repeated_target: Literal["drop", "keep"] = "drop"
    """A user whose target was consumed before: dropped or kept; counted either way. A kept target is the only candidate
    that the history holds, which is all that a model needs to know: negatives are never from the history."""
    unknown_items: Literal["fail", "skip"] = "fail"
    """An id in a history that the catalogue lacks: an error, or removed and counted."""
    duplicate_items: Literal["fail", "first"] = "fail"
    """An id with several texts in the item file: an error, or the first text counts and the
    others are counted."""
    empty_items: Literal["fail", "skip"] = "fail"
    """An item without text: an error, or removed (with its clicks) and counted."""
    too_few_negatives: Literal["fail", "skip"] = "fail"
    """A user with fewer eligible catalogue items than negatives needed: an error, or skipped and counted."""
    encoding_errors: Literal["fail", "replace"] = "fail"
    """Bytes that are not UTF-8: an error naming file and line, or replaced and counted."""
    candidates: Literal["uniform", "popularity", "targets", "category", "impressions"] = "uniform"
    """How negatives are drawn: uniformly over the catalogue (the paper), by click count, among other users' targets,
    within the target's category, or from the impressions shown with the target (MIND)."""
    candidates_file: FilePath = ""
    """File in data.path with the candidates of valid and test users, from one's own retriever: rows of user and
    candidates (a list), or of user and item; empty: they are drawn as train's negatives are."""
    missed_targets: Literal["add", "skip"] = "add"
    """A target that candidates_file misses: it joins the list, or its user is left out; counted either way."""
    seen_before_target: bool = False
    """Draw negatives only among items that someone had consumed or was shown before the target's time; of a train user
    with several targets or samples, before the latest one's."""
    train_targets: int = Field(1, ge=1)
    """Train users' latest items that are positives, where data.min_history items remain before them: more to learn from
    few users, which costs only extra suffix tokens. Valid and test users keep their own target."""
    train_prefixes: int = Field(1, ge=1)
    """Samples of a train user, each cut earlier: its train_targets positives are the items before the next one's, and
    its prompt reads what came before them. Each costs as much as another user."""
    split: tuple[int, int, int] = (10, 1, 1)
    """Shares of train, valid and test users, from a hash of the user key."""
    split_by: Literal["user", "time"] = "user"
    """user: hash of the key (stable when users are added); time: the latest targets are test, those before valid."""
    max_users: int = Field(0, ge=0)
    """Keep only the first users in hash order, for trials; 0: all."""

    @property
    def held_out_candidates(self) -> str:
        """Of valid and test users: ``retrieved`` by oneself, or drawn as ``candidates`` says."""
        return "retrieved" if self.candidates_file else self.candidates


class SummarizeSection(Section):
    """docs/summarization.md tells what lies behind these."""

    scheme: str = "hierarchical"
    """hierarchical: a summary of block summaries (as a CNN pools); recurrent: summary t from summary t-1 and block t
    (as an RNN); none: no summary; raw: the items before the recent ones, as text of at most max_new_tokens words, the
    latest where not all fit. A module in trsr_dist/summarize/plans/ adds another one."""
    engine: Literal["extractive", "transformers", "openai", "vllm"] = "extractive"
    """extractive: deterministic, no model; transformers: Hugging Face, in this process; openai: any OpenAI-compatible
    server (vLLM serve, SGLang, llama.cpp); vllm: vLLM in this process, in a separate environment."""
    model: FilePath = ""
    """Model folder, hub id, or the server's model name."""
    revision: str = ""
    """Pinned revision of a hub model; empty: the default branch. openai: only a part of the texts' keys."""
    base_url: str = ""
    """openai: address of the server, such as http://node1:8000/v1; empty: OPENAI_BASE_URL. The key comes from
    OPENAI_API_KEY alone."""
    trust_remote_code: bool = False
    """Run model code from the hub. Off unless you have read that code."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights of the transformers engine; auto: bfloat16 on a GPU, float32 on CPU."""
    cuda_graphs: bool = False
    """The transformers engine starts the kernels of a decoding step with one call, on a GPU."""
    block_size: int = Field(5, ge=1)
    """Items per block (the paper: 5)."""
    fan_in: int = Field(8, ge=2)
    """Hierarchical: at most this many summaries are merged by one prompt; more make a deeper tree."""
    prompt_style: Literal["auto", "plain", "chat"] = "auto"
    """chat: through the model's chat template; auto: when it has one."""
    chat_template_kwargs: TemplateVariables = NO_THOUGHTS
    """Variables of the chat template: here, models that think first (Qwen3) answer at once. {}: none."""
    max_prompt_tokens: int = Field(2048, ge=64)
    """Longer prompts are trimmed by parts: item descriptions evenly, never the instruction."""
    max_new_tokens: int = Field(150, ge=1)
    """Length limit of one summary, in tokens (extractive and raw: words)."""
    temperature: float = Field(0.0, ge=0)
    """0: greedy, which makes the text independent of batch and restart."""
    samples: int = Field(0, ge=0)
    """Above 0: in place of the shards, this many sampled summaries of every train user, below RUN/samples, for
    tools/choose_summaries.py to choose from; needs a temperature."""
    max_in_flight: int = Field(32, ge=1)
    """Requests the engine works on at once (batch size, or concurrent HTTP requests)."""
    timeout_seconds: float = Field(120, gt=0)
    """openai: a request is given up after this time and retried."""
    max_retries: int = Field(5, ge=0)
    """openai: retries of a request, with growing waits."""
    failed_users: Literal["fail", "skip", "recent_only"] = "fail"
    """A user whose summary fails for good: stop the job, leave the user out, or keep the user without a summary."""
    max_failures: int = Field(100, ge=0)
    """More failed users than this stop the job whatever failed_users says."""
    users_per_shard: int = Field(1000, ge=1)
    """Samples in one tar shard; also the unit of work that tasks share."""
    lease_seconds: float = Field(120, gt=0)
    """A unit whose holder shows no life for this long is taken over by another task."""

    @property
    def asks_model(self) -> bool:
        """Whether a language model writes the summaries."""
        return self.engine != "extractive" and self.scheme not in PROMPTLESS

    @field_validator("base_url")
    @classmethod
    def _holds_no_key(cls, base_url: str) -> str:
        if "@" in base_url or "?" in base_url:
            raise ValueError("no user, password or query may stand here; the key comes from OPENAI_API_KEY")
        return base_url


class PromptSection(Section):
    style: Literal["auto", "plain", "chat"] = "auto"
    """chat: through the tokenizer's chat template; auto: when it has one."""
    recent_items: int = Field(5, ge=0)
    """Items shown in full after the summary (the paper's text suggests 3 is best)."""
    max_tokens: int = Field(1024, ge=32)
    """Length limit of one prompt with one candidate, in tokens; longer ones are trimmed by parts."""
    max_candidate_tokens: int = Field(256, ge=8)
    """Limit of one item's text, candidate or recent, in tokens (and in 16 times as many characters)."""
    answers: tuple[str, str] = ("yes", "no")
    """The two answers; each must be one token where the prompt ends."""
    chat_template_kwargs: TemplateVariables = NO_THOUGHTS
    """Variables of the chat template: here, models that think first (Qwen3) answer at once. {}: none."""


class ModelSection(Section):
    name_or_path: FilePath = ""
    """Folder or hub id of the base model. RUN/base stands for the model that tools/make_tiny_base.py made."""
    revision: str = ""
    """Pinned revision of a hub model; empty: the default branch."""
    trust_remote_code: bool = False
    """Run model code from the hub. Off unless you have read that code."""
    attention: Literal["auto", "flash_attn", "flash_attn_4", "torch", "flex", "cpu", "dense"] = "auto"
    """Back end of the shared-prefix attention; auto: the fastest of flash_attn, torch, cpu and dense that runs here
    and gives the results of exact attention on a row, forward and backward."""
    kernels: Literal["auto", "none", "liger"] = "none"
    """Liger-Kernel's fused norms, gated MLPs and rotary positions in training (extra: liger); auto: on a GPU that has
    them."""
    quantization: Annotated[Literal["none", "4bit", "8bit", "fp8"], OnResume.REFUSED] = "none"
    """Hold the frozen base's layers in fewer bits: 4bit and 8bit through bitsandbytes (extra: quantization); fp8: with
    FP8 products, on GPUs from compute capability 8.9 on."""
    compile: bool = False
    """Compile the decoder layers before a training's first step (minutes; needs a C++ compiler and Triton on GPUs)."""


class LoraSection(Section):
    r: Annotated[int, OnResume.REFUSED] = Field(8, ge=1)
    """Rank: higher trains more weights and needs more memory; what it does for accuracy was not compared."""
    alpha: Annotated[float, OnResume.REFUSED] = Field(16, gt=0)
    """Scale: the update is alpha / r * BA."""
    dropout: Annotated[float, OnResume.SAID] = Field(0.05, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    target_modules: Annotated[Modules, OnResume.REFUSED] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of linear modules, or all-linear."""
    use_rslora: Annotated[bool, OnResume.REFUSED] = False
    """Scale by alpha / sqrt(r) instead (arXiv 2312.03732)."""
    init: Annotated[Literal["kaiming", "gaussian"], OnResume.SAID] = "kaiming"
    """How A starts; B starts at 0."""


class TrainSection(Section):
    loss: Annotated[Literal["answer", "full_text", "pairwise", "listwise", "distill"], OnResume.SAID] = "answer"
    """answer: cross-entropy of the answer token; full_text: of all tokens, as the paper's code; pairwise and listwise:
    over a user's candidates; distill: listwise, and the order and distances that train.teacher gives the candidates."""
    teacher: Annotated[FilePath, OnResume.SAID] = ""
    """distill: the model whose scores tools/score_shards.py has put beside the train shards; the folder given there."""
    teacher_weight: Annotated[float, OnResume.SAID] = Field(0.5, ge=0, le=1)
    """distill: share of the divergence from the teacher; the rest is the listwise loss."""
    teacher_temperature: Annotated[float, OnResume.SAID] = Field(1.0, gt=0)
    """distill: both models' log-odds are divided by it; above 1 the teacher's order among negatives counts more."""
    init_adapter: Annotated[FilePath, OnResume.REFUSED] = ""
    """Folder of a PEFT adapter, or another run's checkpoint, whose weights the training starts from; empty: a fresh
    adapter, which leaves the base as it is."""
    negatives_per_positive: int = Field(1, ge=1)
    """Negatives drawn per epoch from the sample's pool (the paper: 1)."""
    pool_size: int = Field(20, ge=1, le=100_000)
    """Negatives kept in each train sample, to draw from: a sample holds the texts of all of them, hence the limit."""
    pool: Literal["all", "mined"] = "all"
    """Negatives to draw from: all of the sample's, or those that tools/mine_negatives.py has found to be hard."""
    learning_rate: Annotated[float, OnResume.SAID] = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    warmup_ratio: Annotated[float, OnResume.SAID] = Field(0.03, ge=0, lt=1)
    """Share of the steps in which the rate rises linearly from 0."""
    schedule: Annotated[Literal["linear", "cosine", "constant"], OnResume.SAID] = "linear"
    """What the rate does after the warm-up; linear and cosine end at 0."""
    weight_decay: Annotated[float, OnResume.SAID] = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    adam_betas: Annotated[tuple[Beta, Beta], OnResume.SAID] = (0.9, 0.95)
    """AdamW's betas (the paper's code: 0.9, 0.95)."""
    max_grad_norm: Annotated[float, OnResume.SAID] = Field(1.0, ge=0)
    """Gradients are clipped to this global norm; 0: no clipping."""
    num_epochs: float = Field(1.0, gt=0)
    """Passes over the train users."""
    max_steps: int = Field(0, ge=0)
    """Optimizer steps in all; 0: by num_epochs."""
    row_tokens: int = Field(4096, ge=64)
    """Length of one packed row, in tokens. Memory grows with it."""
    rows_per_step: int = Field(8, ge=1)
    """Rows in one optimizer step over all ranks: row_tokens * rows_per_step is the global batch in tokens. No training
    may have more ranks than this: choose it for the largest cluster that the run will see."""
    deepspeed_config: FilePath = "ds_configs/zero1.json"
    """ZeRO stage, buckets and offload only. Batch, precision, clipping, optimizer and schedule are settings of the run:
    an error in that file."""
    precision: Annotated[Literal["auto", "float32", "bfloat16"], OnResume.SAID] = "auto"
    """auto: bfloat16 on a GPU that has it, float32 on CPU."""
    activation_checkpointing: bool | Literal["selective"] = True
    """Recompute activations in the backward pass. true: all of a layer, the least memory, about a third more time;
    selective: what is cheap, while products of matrices and the attention are kept; false: nothing."""
    num_workers: int = Field(1, ge=0)
    """Reader processes per rank; 0 reads in the training process."""
    shards_url: StorePath = ""
    """Where the train split's tars are, if not in RUN/shards/train: an address in a store, such as
    s3://bucket/run/shards/train. Manifest, indexes and lengths stay in the run folder."""
    cache_dir: FilePath = ""
    """Folder on each node's own disk for copies of the train shards, shared by the node's ranks; empty: no copies."""
    cache_gb: float = Field(100.0, gt=0)
    """Limit of all copies in cache_dir, in GB; shards beyond it are read where they lie."""
    save_every_steps: int = Field(100, ge=1)
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = Field(3, ge=2)
    """Recent checkpoints kept, beside the best; 1 is refused since the newest may be the corrupt one."""
    evaluate_every_steps: int = Field(0, ge=0)
    """Steps between rankings of the validation users; 0: never."""
    evaluate_users: int = Field(1000, ge=0)
    """Validation users ranked in training, the first of the split; 0: all."""
    best_metric: Annotated[str, OnResume.SAID] = "ndcg@10"
    """Validation metric that names the best checkpoint."""
    early_stopping_patience: int = Field(0, ge=0)
    """Stop after this many evaluations without a better best_metric; 0: never."""
    log_every_steps: int = Field(10, ge=1)
    """Steps between log lines and metric rows."""
    timeout_seconds: float = Field(600, gt=0)
    """A collective that takes longer ends the job and names the rank that was missing."""
    hang_seconds: float = Field(40, ge=4)
    """A rank without a sign of life, or a phase of a step without progress, for so long (a phase: also three times the
    longest of its kind) ends the job with status 74 and is named with its Python calls."""
    data_errors: Literal["fail", "skip"] = "fail"
    """A damaged sample stops the run, or is replaced by an empty one and counted."""
    max_data_errors: int = Field(100, ge=0)
    """With data_errors: skip, more than this many stop the run; those of all ranks and of earlier starts count."""
    max_bad_steps: int = Field(5, ge=0)
    """Steps with a non-finite loss or gradient are skipped; more than this many in a row stop the run."""
    walltime_seconds: float = Field(0, ge=0)
    """Checkpoint and leave in time for this limit, counted from the start; 0: ask Slurm, else none."""


class EvaluateSection(Section):
    split: Literal["valid", "test"] = "test"
    """Users to rank for."""
    negatives_per_positive: int = Field(20, ge=1)
    """Negatives in a valid or test user's fixed candidate list."""
    top_k: Annotated[tuple[PositiveInt, ...], DISTINCT] = Field((3, 5, 10), min_length=1)
    """Cut-offs of Recall, MRR and NDCG."""
    row_tokens: int = Field(8192, ge=64)
    """Length of one packed row in evaluation, in tokens."""
    protocols: Annotated[tuple[Literal["uniform", "popularity", "targets"], ...], DISTINCT] = ()
    """Further candidate lists of the same users, drawn as data.candidates draws them, ranked by model, control and the
    baselines without a language model. Each costs as much again as model and control."""
    deepspeed_config: FilePath = ""
    """A file with ZeRO stage 3 divides weights that one device cannot hold; empty: the whole model on each device."""
    baselines: Annotated[
        tuple[
            Literal["popularity", "recency", "bm25", "gru4rec", "sasrec", "base", "control", "no_summary", "no_recent"],
            ...,
        ],
        DISTINCT,
    ] = ("popularity", "base", "control")
    """Ranked beside the model. From train users' clicks: popularity, recency (latest clicks), gru4rec and sasrec
    (trained here on one core, four times over a small grid, and kept for each seed: minutes for thousands of users,
    hours for a million); bm25: words of the history against the candidate's; base: the model before fine-tuning;
    no_summary, no_recent: without that part of the prompt; each of the last three costs as much as the model itself.
    Always there: control (with another user's summary and recent items) and random (its exact expectation)."""
    bootstrap_samples: int = Field(1000, ge=0)
    """Resamples of the users for the 95% confidence intervals; 0: none."""
    max_users: int = Field(0, ge=0)
    """Rank only for the first users of the split, for trials; 0: all."""


class BaseSection(Section):
    """The small model that tools/make_tiny_base.py makes where no weights are at hand."""

    hidden_size: int = Field(128, ge=16)
    """Width of the model."""
    num_layers: int = Field(4, ge=1)
    """Transformer layers."""
    num_heads: int = Field(4, ge=1)
    """Attention heads."""
    num_kv_heads: int = Field(4, ge=1)
    """Key and value heads; fewer than heads: grouped-query attention."""
    intermediate_size: int = Field(352, ge=16)
    """Width of the MLP."""
    vocab_size: int = Field(2048, ge=512)
    """Upper limit of the byte-level BPE vocabulary, which is trained on the texts."""
    steps: int = Field(700, ge=1)
    """Pre-training steps."""
    batch_size: int = Field(4, ge=1)
    """Documents in a pre-training step; one has at most prompt.max_tokens tokens. Many small steps learn faster."""
    learning_rate: float = Field(0.01, gt=0)
    """Peak learning rate of Muon on the layers' matrices; the other weights have AdamW at half of it."""
    prompt_share: float = Field(0.8, ge=0, le=1)
    """Share of prompt-shaped documents, the others being plain texts. Their answers are drawn at random, so that
    nothing of the labels is learned."""
