"""vLLM in this process, through its synchronous ``LLMEngine``.

vLLM pins its own torch and transformers, so it needs a separate environment with this package in it; a server
(``vllm serve``, engine=openai) needs none of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trsr_dist.bases import read_model_config
from trsr_dist.errors import ConfigError, DataError, ModelError
from trsr_dist.pretrained import BaseSource, load_tokenizer
from trsr_dist.summarize.engines.encoding import PromptEncoder, naming_setting
from trsr_dist.summarize.quality import TURN_MARKERS
from trsr_dist.summarize.requests import WHOLE, Completion, Request

try:
    from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind
except ImportError as error:
    raise ConfigError(
        f"summarize.engine=vllm: no vLLM here ({error}); pip install vllm in a separate environment, then "
        "pip install --no-deps -e . there (docs/summarization.md); or serve the model and use engine=openai"
    ) from None


class VllmEngine:
    """Hands requests to vLLM's own scheduler, which batches them as they come.

    Args:
        model: folder or hub id.
        revision: of a hub model; empty: the default branch.
        trust_remote_code: run the model's own code.
        precision: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        encoder: the model's tokenizer, with the prompt's style and limit.
        max_in_flight: sequences generated at once.
        max_new_tokens: of a text; with the prompt's limit the context that vLLM reserves memory for.
    """

    def __init__(
        self,
        model: str,
        revision: str,
        trust_remote_code: bool,
        precision: str,
        encoder: PromptEncoder,
        max_in_flight: int,
        max_new_tokens: int,
    ) -> None:
        self.capacity = 2 * max_in_flight
        self.encoder = encoder
        self._done: list[Completion] = []
        self._words_cut: dict[str, int] = {}
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=model,
                revision=revision or None,
                trust_remote_code=trust_remote_code,
                dtype=precision,
                max_num_seqs=max_in_flight,
                max_model_len=encoder.max_prompt_tokens + max_new_tokens,
                enable_prefix_caching=True,
            )
        )

    @classmethod
    def load(
        cls,
        name_or_path: str,
        revision: str,
        trust_remote_code: bool,
        precision: str,
        prompt_style: str,
        template_kwargs: Mapping[str, Any],
        max_prompt_tokens: int,
        max_in_flight: int,
        max_new_tokens: int,
    ) -> VllmEngine:
        """Load model and tokenizer.

        Raises:
            ModelError: the tokenizer cannot be loaded, or vLLM does not start.
        """
        with naming_setting(name_or_path):
            if Path(name_or_path).is_dir():
                read_model_config(Path(name_or_path))
            tokenizer = load_tokenizer(BaseSource(name_or_path, revision, trust_remote_code))
        encoder = PromptEncoder(tokenizer, prompt_style, max_prompt_tokens, template_kwargs)
        try:
            return cls(name_or_path, revision, trust_remote_code, precision, encoder, max_in_flight, max_new_tokens)
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(
                f"summarize.model={name_or_path!r}: vLLM does not start: {error}; the model's context must hold "
                f"summarize.max_prompt_tokens={max_prompt_tokens} and max_new_tokens={max_new_tokens}, and the GPU "
                "both model and cache"
            ) from error

    def submit(self, request: Request) -> None:
        sampling = SamplingParams(
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed if request.temperature else None,
            stop=None if self.encoder.style == "chat" else list(TURN_MARKERS),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        try:
            prompt, self._words_cut[request.key] = self.encoder.fit(request.prompt)
            self._engine.add_request(request.key, TokensPrompt(prompt_token_ids=prompt), sampling)
        except (DataError, ValueError, VLLMClientError) as error:
            self._done.append(Completion(request.key, error=str(error)))

    def poll(self) -> list[Completion]:
        while not self._done and self._engine.has_unfinished_requests():
            finished = [output for output in self._engine.step() if output.finished]
            for output in finished:
                key, written, words_cut = output.request_id, output.outputs[0], self._words_cut.pop(output.request_id)
                if written.finish_reason not in WHOLE:
                    error = f"vLLM broke the text off: finish_reason {written.finish_reason!r}"
                    self._done.append(Completion(key, error=error))
                    continue
                text, cut = self.encoder.opening + written.text, written.finish_reason == "length"
                num_prompt, num_new = len(output.prompt_token_ids), len(written.token_ids)
                self._done.append(Completion(key, text, cut, num_prompt, num_new, words_cut))
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        del self._engine
