"""vLLM in this process, through its synchronous ``LLMEngine``.

vLLM pins its own torch and transformers, so it needs a separate environment with this package in it; a server
(``vllm serve``, engine=openai) needs none of that.
"""

from __future__ import annotations

from pathlib import Path

from trsr_dist.bases import read_model_config
from trsr_dist.errors import ConfigError, DataError, ModelError
from trsr_dist.pretrained import BaseSource, load_tokenizer
from trsr_dist.summarize.engines.encoding import PromptEncoder, naming_setting
from trsr_dist.summarize.quality import STOPS
from trsr_dist.summarize.requests import WHOLE, Completion, EngineSettings, Request

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
        settings: of the model; the limits of prompts and texts are the context that vLLM reserves memory for.
        encoder: the model's tokenizer, with the prompt's style and limit.
    """

    def __init__(self, settings: EngineSettings, encoder: PromptEncoder) -> None:
        self.capacity = 2 * settings.max_in_flight
        self.encoder = encoder
        self._done: list[Completion] = []
        self._words_cut: dict[str, int] = {}
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=settings.model,
                revision=settings.revision or None,
                trust_remote_code=settings.trust_remote_code,
                dtype=settings.precision,
                max_num_seqs=settings.max_in_flight,
                max_model_len=settings.max_prompt_tokens + settings.max_new_tokens,
                enable_prefix_caching=True,
            )
        )

    @classmethod
    def load(cls, settings: EngineSettings) -> VllmEngine:
        """Load model and tokenizer.

        Raises:
            ModelError: the tokenizer cannot be loaded, or vLLM does not start.
        """
        with naming_setting(settings.model):
            if Path(settings.model).is_dir():
                read_model_config(Path(settings.model))
            tokenizer = load_tokenizer(BaseSource(settings.model, settings.revision, settings.trust_remote_code))
        encoder = PromptEncoder.of(tokenizer, settings)
        try:
            return cls(settings, encoder)
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(
                f"summarize.model={settings.model!r}: vLLM does not start: {error}; the model's context must hold "
                f"summarize.max_prompt_tokens={settings.max_prompt_tokens} and "
                f"max_new_tokens={settings.max_new_tokens}, and the GPU both model and cache"
            ) from error

    def submit(self, request: Request) -> None:
        sampling = SamplingParams(
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed if request.temperature else None,
            stop=None if self.encoder.style == "chat" else list(STOPS),
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
