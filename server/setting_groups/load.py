"""How much is taken on at once, and for how long."""

from __future__ import annotations

from server.setting_groups.field import SettingGroup, setting
from server.setting_groups.values import Size


class LoadSettings(SettingGroup):
    heading = "Load"

    max_num_seqs: int = setting(256, "Requests that run at the same time.", gt=0, le=4096)
    max_num_batched_tokens: Size = setting(2048, "Tokens computed in one step, prompts included.", ge=512)
    max_queued_requests: int = setting(256, "Requests that may wait; the next one is told 429 with Retry-After.", ge=0)
    max_concurrent_requests: int | None = setting(
        None, "Requests in the house at once, running and waiting. Default: no bound but the queue's.", gt=0
    )
    max_best_of: int = setting(4, "Largest best_of of one request.", ge=1)
    max_stop_sequences: int = setting(16, "Stop strings one request may name.", ge=0)
    max_top_n_tokens: int = setting(20, "Alternatives one request may ask for per token.", ge=0)
    request_timeout_s: float | None = setting(600.0, "Seconds after which an unfinished request is failed.", gt=0)
    stalled_client_s: float = setting(
        60.0, "Seconds that a client may take nothing of its stream, or send nothing of its upload.", gt=0
    )
    upload_timeout_s: float = setting(3600.0, "Seconds after which an upload that is still arriving is dropped.", gt=0)
    max_concurrent_uploads: int = setting(
        8, "Uploads that arrive or are checked at once; the next one is told 429 with Retry-After.", gt=0
    )
    max_staged_bytes: Size = setting(
        16 * 2**30,
        "Most that uploads and downloads under way may take on disk together; what is over it is told 429.",
        gt=0,
        metavar="SIZE",
    )
    graceful_timeout_s: float = setting(90.0, "Seconds that running requests get to finish after SIGTERM.", ge=0)
    max_body_bytes: Size = setting(4 * 2**20, "Largest body of a request that is not an upload.", gt=0, metavar="SIZE")
