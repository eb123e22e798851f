"""Names in `/metrics`, and the attribute that each one shows. Prefixes are added where they are used."""

from __future__ import annotations

Rows = tuple[tuple[str, str, str], ...]  # (name without prefix and suffix, attribute, help text)

OWN_GAUGES: Rows = (
    ("requests_running", "num_running", "Requests that have a place in the step."),
    ("requests_waiting", "num_waiting", "Requests accepted and not running."),
    ("requests_waiting_for_adapter", "num_waiting_for_adapter", "Waiting requests whose adapter is not there yet."),
    ("pool_units", "num_units", "Units of device memory beyond the weights."),
    ("pool_units_free", "units_free", "Units nobody uses."),
    ("pool_units_kv", "units_kv", "Units that running requests use."),
    ("pool_units_cached", "units_cached", "Units kept for prefix hits, evictable."),
    ("pool_units_adapters_pinned", "units_adapters_pinned", "Units of adapters in use or being loaded."),
    ("pool_units_adapters_idle", "units_adapters_idle", "Units of adapters that could be evicted."),
    ("adapters_resident", "num_adapters_resident", "Adapters on the device."),
    ("adapters_loading", "num_adapters_loading", "Adapters on their way to the device."),
    ("last_step_sequences", "last_step_sequences", "Sequences in the last step."),
    ("last_step_tokens", "last_step_tokens", "Tokens in the last step."),
    ("last_step_adapters", "last_step_adapters", "Distinct adapters in the last step."),
    ("last_step_seconds", "last_step_s", "Duration of the last step."),
)
OWN_COUNTERS: Rows = (
    ("steps", "total_steps", "Steps since the engine started."),
    ("steps_shed", "total_steps_shed", "Steps that ran out of memory and were retried smaller."),
    ("steps_failed", "total_steps_failed", "Steps that broke."),
    ("prompt_tokens", "total_prompt_tokens", "Prompt tokens computed or found in the cache."),
    ("generation_tokens", "total_generation_tokens", "Tokens generated."),
    ("prefix_cache_queries", "total_prefix_queries", "Prompt tokens looked up in the prefix cache."),
    ("prefix_cache_hits", "total_prefix_hits", "Prompt tokens found in the prefix cache."),
    ("kv_evictions", "total_kv_evictions", "Cached blocks given up for others."),
    ("preemptions", "total_preemptions", "Running requests sent back to wait."),
    ("adapter_device_loads", "total_adapter_loads", "Adapters brought to the device."),
    ("adapter_load_failures", "total_adapter_load_failures", "Adapters that did not reach the device."),
)
VLLM_GAUGES: Rows = (
    ("num_requests_running", "num_running", "Requests that have a place in the step."),
    ("num_requests_waiting", "num_waiting", "Requests accepted and not running."),
    ("kv_cache_usage_perc", "kv_usage", "Share of the cache in use, 0 to 1."),
)
VLLM_COUNTERS: Rows = (
    ("prompt_tokens", "total_prompt_tokens", "Prompt tokens."),
    ("generation_tokens", "total_generation_tokens", "Tokens generated."),
    ("prefix_cache_queries", "total_prefix_queries", "Prompt tokens looked up in the prefix cache."),
    ("prefix_cache_hits", "total_prefix_hits", "Prompt tokens found in the prefix cache."),
    ("num_preemptions", "total_preemptions", "Running requests sent back to wait."),
)
VLLM_ENGINE_HISTOGRAMS: Rows = (
    ("time_to_first_token_seconds", "first_token_s", "Submission until the first token."),
    ("inter_token_latency_seconds", "token_gap_s", "Time between two tokens of a request."),
    ("iteration_tokens_total", "step_tokens", "Tokens in a step."),
)
VLLM_REQUEST_HISTOGRAMS: Rows = (
    ("request_time_per_output_token_seconds", "per_token_s", "A request's mean time per token."),
    ("e2e_request_latency_seconds", "total_s", "Acceptance until the end."),
    ("request_queue_time_seconds", "queue_s", "Acceptance until first scheduled."),
    ("request_inference_time_seconds", "inference_s", "First scheduled until the end."),
    ("request_prefill_time_seconds", "prefill_s", "First scheduled until the first token."),
    ("request_decode_time_seconds", "decode_s", "First token until the end."),
    ("request_prompt_tokens", "num_prompt_tokens", "Tokens of a prompt."),
    ("request_generation_tokens", "num_generated_tokens", "Tokens of an answer."),
    ("request_max_num_generation_tokens", "num_generated_tokens", "Tokens of the longest answer of a request."),
    ("request_params_max_tokens", "max_new_tokens", "Tokens an answer could have had."),
    ("request_params_n", "num_sequences", "Answers per request."),
)
VLLM_FINISHED_REASONS = {  # vLLM's reason -> our outcomes
    "stop": ("eos_token", "stop_sequence"),
    "length": ("length",),
    "abort": ("aborted",),
    "error": ("failed",),
    "repetition": (),
}
