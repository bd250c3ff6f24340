"""One good document of each kind that only L7 reads, with as many of its fields as fit: what property tests damage."""

from __future__ import annotations

_ROUTES = "gateway.networking.k8s.io/v1"
_BACKEND = {"name": "a", "port": 80, "weight": 1, "namespace": "b"}

L7_SAMPLES: list[dict[str, object]] = [
    {
        "apiVersion": _ROUTES,
        "kind": "HTTPRoute",
        "metadata": {"name": "a"},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "a", "port": 80}],
            "hostnames": ["a.example"],
            "rules": [
                {
                    "name": "x",
                    "matches": [
                        {
                            "path": {"type": "PathPrefix", "value": "/a"},
                            "headers": [{"name": "x", "value": "y", "type": "RegularExpression"}],
                            "queryParams": [{"name": "x", "value": "y"}],
                            "method": "GET",
                        }
                    ],
                    "filters": [
                        {"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "a", "value": "b"}], "remove": ["c"]}},
                        {"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "a", "port": 80}, "percent": 10}},
                        {
                            "type": "URLRewrite",
                            "urlRewrite": {"hostname": "b", "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"}},
                        },
                        {"type": "CORS", "cors": {"allowOrigins": ["https://*.a"], "maxAge": 5}},
                    ],
                    "backendRefs": [{**_BACKEND, "filters": [{"type": "ExtensionRef"}]}],
                    "timeouts": {"request": "1s", "backendRequest": "1ms"},
                    "retry": {"codes": [500], "attempts": 1, "backoff": "1s"},
                }
            ],
        },
    },
    {
        "apiVersion": _ROUTES,
        "kind": "GRPCRoute",
        "metadata": {"name": "a"},
        "spec": {"rules": [{"matches": [{"method": {"service": "a", "method": "b"}}], "backendRefs": [_BACKEND]}]},
    },
    {
        "apiVersion": _ROUTES,
        "kind": "TLSRoute",
        "metadata": {"name": "a"},
        "spec": {"hostnames": ["a"], "rules": [{"backendRefs": [_BACKEND]}]},
    },
    {
        "apiVersion": "gateway.networking.k8s.io/v1beta1",
        "kind": "ReferenceGrant",
        "metadata": {"name": "a"},
        "spec": {"from": [{"group": "", "kind": "Service", "namespace": "a"}], "to": [{"group": "", "kind": "Service", "name": "a"}]},
    },
]
