"""GET routes: what is served, how it is doing. HEAD works on each (server.middleware)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from server.cost import summary
from server.errors import ApiError
from server.replies import Cost, Health, Load, ModelCard, ModelList, Ready, Version
from server.service import Service
from server.version import version

router = APIRouter()


def card(service: Service, name: str) -> ModelCard:
    info = service.client.info
    return ModelCard(
        id=name,
        object="model",
        created=service.created,
        owned_by="fen",
        root=service.model,
        parent=None,
        max_model_len=info.max_model_len if info else None,
    )


@router.get("/v1/models")
@router.get("/models", include_in_schema=False)
async def list_models(request: Request) -> ModelList:
    """What is served."""
    service: Service = request.app.state.service
    return ModelList(object="list", data=[card(service, name) for name in service.models])


@router.get("/v1/models/{model:path}")
@router.get("/models/{model:path}", include_in_schema=False)
async def retrieve_model(model: str, request: Request) -> ModelCard:
    """One of them; 404 `model_not_found` for another name."""
    service: Service = request.app.state.service
    service.check_model(model)
    return card(service, model)


@router.get("/health")
async def health(request: Request) -> Health:
    """200 while the engine's heartbeat says that it can answer; 503 with the reason otherwise."""
    request.app.state.service.check_ready()
    return Health(status="ok")


@router.get("/ready")
async def ready(request: Request) -> Ready:
    """For load balancers: 503 while loading, restarting or draining."""
    request.app.state.service.check_ready()
    return Ready(status="ready")


@router.get("/version")
async def get_version() -> Version:
    """Fen's own."""
    return Version(version=version())


@router.get("/load")
async def load(request: Request) -> Load:
    """What is in flight now; the engine's part is at most a second old."""
    service: Service = request.app.state.service
    stats = service.client.stats
    return Load(
        server_load=service.admitted,
        engine=service.client.activity,
        running=stats.running,
        waiting=service.waiting,
        kv_cache_usage=stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0,
        kv_blocks_used=stats.blocks_used,
        kv_blocks_total=stats.blocks_total,
    )


@router.get("/v1/cost", response_model=Cost)
async def cost(request: Request) -> dict[str, Any]:
    """Where every device second since the start went, and what it cost (docs/cost.md)."""
    service: Service = request.app.state.service
    info, ledger = service.client.info, service.client.stats.ledger
    if ledger is None:
        raise ApiError(503, "the engine keeps no ledger", retry_after=2)
    device = info.device if info else None
    joules, reason = service.energy.read(device) if device else (None, "the engine is not ready")
    made_up = service.settings.engine.load_format == "dummy"
    notes = {"measured on a CPU": bool(device and device.startswith("cpu")), "the weights are made up": made_up}
    return {
        "object": "cost",
        "model": service.model,
        "quantization": info.quantization if info else None,
        "device": device,
        "notes": [note for note, true in notes.items() if true],
        **summary(ledger, *service.price()),
        "energy": {"joules": joules, "reason": reason},
    }


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """For Prometheus, under vLLM's names."""
    return Response(request.app.state.service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.api_route("/v1/embeddings", methods=["POST", "GET"], include_in_schema=False)
@router.api_route("/embeddings", methods=["POST", "GET"], include_in_schema=False)
async def embeddings() -> None:
    raise ApiError(404, "embeddings are not served by this model")  # a 4xx: clients retry every 5xx
