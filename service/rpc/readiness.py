"""What the names of the health service mean, as a function of what is served."""

from attendant.v1 import inference_service_pb2, model_service_pb2
from service.rpc.catalog import ModelCatalog, State

INFERENCE_SERVICE = inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
MODEL_SERVICE = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name


def health_of(catalog: ModelCatalog, *, loading: bool, draining: bool) -> dict[str, bool]:
    """Return whether each name of the health service serves.

    "" and "readiness": all bundles are through their checks and at least one is served; "startup": all are through;
    "liveness": no engine is stuck, and something is served or may come to be; "model/<name>" and
    "model/<name>/<version>": that one is served.
    """
    healthy = {
        entry.key: entry.served is not None and entry.served.loop.healthy and not draining for entry in catalog.entries
    }
    alive = all(model.loop.healthy for model in catalog.served)
    is_lost = not loading and all(entry.state is State.UNAVAILABLE for entry in catalog.entries)
    ready = alive and not loading and any(healthy.values())
    names = {
        "": ready,
        "readiness": ready,
        "startup": not loading,
        "liveness": alive and not is_lost,
        INFERENCE_SERVICE: any(healthy.values()),
        MODEL_SERVICE: not draining,
    }
    for entry in catalog.entries:
        names[f"model/{entry.key}"] = healthy[entry.key]
        names[f"model/{entry.name}"] = names.get(f"model/{entry.name}", False) or healthy[entry.key]
    return names
