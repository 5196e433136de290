"""The OpenAPI description of a worker's HTTP server, made of the classes that its calls take."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import attrs

from weight_transfer.config.settings import MAX_SECONDS
from weight_transfer.config.structuring import MAX_INT
from weight_transfer.control.serving_calls import SESSION
from weight_transfer.model.info import (
    WeightNeeds,
    WeightNeedsRequest,
    WeightTransferInitInfo,
    WeightTransferInitRequest,
    WeightTransferUpdateInfo,
    WeightTransferUpdateRequest,
)

if TYPE_CHECKING:
    from weight_transfer.control.serving_calls import Offer

Schema = dict[str, Any]

_INFOS = {
    (WeightTransferInitRequest, "init_info"): WeightTransferInitInfo,
    (WeightTransferUpdateRequest, "update_info"): WeightTransferUpdateInfo,
    (WeightNeedsRequest, "request"): WeightNeeds,
}
"""What the tables of requests hold; backends add keys."""
_SCALARS: dict[Any, Schema] = {
    bool: {"type": "boolean"},
    int: {"type": "integer", "minimum": -MAX_INT, "maximum": MAX_INT},
    float: {"type": "number"},
    str: {"type": "string"},
    bytes: {"type": "string", "contentEncoding": "base64"},
    type(None): {"type": "null"},
}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        }
    },
}
_REFUSALS = {
    "400": "The body is no JSON, or a key is wrong; the sentence names it.",
    "401": "The bearer token, or a certificate, is missing or wrong.",
    "403": "The request is a web page's, or calls this worker by a name that it does not have.",
    "408": "The body did not come in time.",
    "409": "The call does not fit the worker's state, or its weights.",
    "413": "The body is too long.",
    "415": "The content type is not application/json.",
    "500": "The update, or a part of it, failed.",
    "504": "A deadline passed.",
}


def describe(offers: Mapping[str, Offer], version: str) -> Schema:
    """Return the description as JSON-safe data.

    Args:
        offers: the calls that the server takes.
        version: of this library.
    """
    paths = {f"/{name}": {"get" if name == "status" else "post": _operation(name, offers[name])} for name in offers}
    health = _answers({}) | {"503": {"description": "An update has failed, so that no version is served."}}
    paths["/healthz"] = {"get": {"summary": "Say whether a version is served.", "security": [], "responses": health}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "weight-transfer worker", "version": version},
        "servers": [{"url": "."}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _ERROR},
        },
    }


def schema_of(kind: Any) -> Schema:
    """Return the JSON Schema of a type that `structure` takes; of any other type nothing is said."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in _SCALARS:
        return dict(_SCALARS[kind])
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, UnionType):
        return {"anyOf": [schema_of(each) for each in arguments]}
    if origin in (list, tuple):
        return {"type": "array", "items": schema_of(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(arguments[1])}
    return _table(kind) if attrs.has(kind) else {}


def _table(cls: type[Any], *, open_to_more: bool = False) -> Schema:
    fields = attrs.fields(attrs.resolve_types(cls))
    return {
        "type": "object",
        "properties": {field.name: _field(cls, field) for field in fields},
        "required": [field.name for field in fields if field.default is attrs.NOTHING],
        "additionalProperties": open_to_more,
    }


def _field(cls: type[Any], field: attrs.Attribute[Any]) -> Schema:
    info = _INFOS.get((cls, field.name))
    if info is not None:
        return _table(info, open_to_more=True)
    if field.name == "session":
        return {"anyOf": [{"type": "string", "pattern": f"^{SESSION}$"}, {"type": "null"}]}
    if field.name == "timeout":
        seconds = {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_SECONDS}
        return seconds if field.default is attrs.NOTHING else {"anyOf": [seconds, {"type": "null"}]}
    if field.metadata.get("weight_transfer_sent_once"):
        return {"type": "object", "properties": {"digest": {"type": "string"}, "value": {}}}
    return schema_of(field.type)


def _operation(name: str, offer: Offer) -> Schema:
    summary = (offer.call.__doc__ or name.replace("_", " ")).strip().partition("\n")[0]
    operation: Schema = {"operationId": name, "summary": summary, "responses": _answers(_REFUSALS)}
    if offer.body is not None:
        body = {"application/json": {"schema": _table(offer.body)}}
        operation["requestBody"] = {"required": True, "content": body}
    return operation


def _answers(refusals: Mapping[str, str]) -> Schema:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    refused = {code: {"description": why, "content": error} for code, why in refusals.items()}
    done: Schema = {"200": {"description": "Done.", "content": {"application/json": {"schema": {"type": "object"}}}}}
    return done | {"204": {"description": "Done, and there is nothing to say."}} | refused
