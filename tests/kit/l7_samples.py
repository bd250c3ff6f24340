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
    {
        "apiVersion": "networking.istio.io/v1",
        "kind": "DestinationRule",
        "metadata": {"name": "a"},
        "spec": {
            "host": "a",
            "exportTo": ["."],
            "trafficPolicy": {
                "loadBalancer": {
                    "consistentHash": {"httpCookie": {"name": "a", "ttl": "1s"}, "maglev": {"tableSize": 101}},
                    "localityLbSetting": {"distribute": [{"from": "a", "to": {"b": 100}}]},
                    "warmup": {"duration": "1s"},
                },
                "connectionPool": {"tcp": {"maxConnections": 1, "tcpKeepalive": {"time": "1s"}}, "http": {"maxRetries": 1}},
                "outlierDetection": {"interval": "1s"},
                "tls": {"mode": "SIMPLE", "credentialName": "a", "subjectAltNames": ["a"]},
                "portLevelSettings": [{"port": {"number": 80}, "proxyProtocol": {"version": "V1"}, "retryBudget": {"percent": 1}}],
            },
            "subsets": [{"name": "a", "labels": {"a": "b"}, "trafficPolicy": {"tunnel": {}}}],
        },
    },
    {
        "apiVersion": _ROUTES,
        "kind": "BackendTLSPolicy",
        "metadata": {"name": "a"},
        "spec": {
            "targetRefs": [{"group": "", "kind": "Service", "name": "a", "sectionName": "b"}],
            "validation": {
                "caCertificateRefs": [{"group": "", "kind": "ConfigMap", "name": "a"}],
                "hostname": "a",
                "subjectAltNames": [{"type": "Hostname", "hostname": "a"}],
            },
        },
    },
    {
        "apiVersion": "gateway.networking.x-k8s.io/v1alpha1",
        "kind": "XBackendTrafficPolicy",
        "metadata": {"name": "a"},
        "spec": {
            "targetRefs": [{"group": "", "kind": "Service", "name": "a"}],
            "retryConstraint": {"budget": {"percent": 1, "interval": "1s"}, "minRetryRate": {"count": 1, "interval": "1s"}},
        },
    },
    {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"}, "data": {"tls.crt": "YQ=="}, "stringData": {"tls.key": "a"}},
    {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"ca.crt": "a"}},
    {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": {"name": "a"},
        "spec": {
            "hosts": ["a"],
            "gateways": ["mesh"],
            "http": [
                {
                    "name": "a",
                    "match": [
                        {
                            "uri": {"prefix": "/a"},
                            "headers": {"@request.auth.claims[a]": {"exact": "a"}},
                            "queryParams": {"a": {"regex": "a"}},
                        }
                    ],
                    "route": [
                        {"destination": {"host": "a", "port": {"number": 80}}, "weight": 1, "headers": {"request": {"set": {"a": "b"}}}}
                    ],
                    "fault": {"delay": {"fixedDelay": "1s", "percentage": {"value": 1}}, "abort": {"grpcStatus": "OK"}},
                    "retries": {"attempts": 1, "retryOn": "5xx,503", "perTryTimeout": "1s"},
                    "mirror": {"host": "a"},
                    "mirrorPercentage": {"value": 1},
                    "corsPolicy": {"allowOrigins": [{"exact": "a"}], "maxAge": "1s"},
                    "rewrite": {"uriRegexRewrite": {"match": "a", "rewrite": "b"}},
                },
                {"redirect": {"uri": "/a", "redirectCode": 302}},
                {"directResponse": {"status": 200, "body": {"bytes": "YQ=="}}},
                {"delegate": {"name": "a", "namespace": "b"}},
            ],
            "tcp": [{"match": [{"port": 80, "destinationSubnets": ["10.0.0.0/8"]}], "route": [{"destination": {"host": "a"}}]}],
            "tls": [{"match": [{"sniHosts": ["a"]}], "route": [{"destination": {"host": "a"}}]}],
        },
    },
    {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"name": "a", "labels": {"a": "b"}},
        "spec": {
            "hosts": ["a"],
            "addresses": ["1.1.1.1"],
            "ports": [{"number": 80, "name": "a", "protocol": "HTTP", "targetPort": 81}],
            "location": "MESH_EXTERNAL",
            "resolution": "STATIC",
            "endpoints": [{"address": "1.1.1.2", "ports": {"a": 1}, "labels": {"a": "b"}, "locality": "a/b", "weight": 1}],
            "exportTo": ["."],
        },
        "status": {"addresses": [{"value": "240.240.0.1", "host": "a"}]},
    },
    {
        "apiVersion": "networking.istio.io/v1",
        "kind": "WorkloadEntry",
        "metadata": {"name": "a"},
        "spec": {"address": "1.1.1.1", "labels": {"a": "b"}, "serviceAccount": "a", "ports": {"a": 1}, "network": "a"},
    },
    {
        "apiVersion": "networking.istio.io/v1",
        "kind": "Gateway",
        "metadata": {"name": "a"},
        "spec": {
            "selector": {"a": "b"},
            "servers": [
                {
                    "name": "a",
                    "port": {"number": 443, "name": "https", "protocol": "HTTPS"},
                    "hosts": ["a/b", "*.c"],
                    "tls": {"mode": "SIMPLE", "credentialName": "a", "minProtocolVersion": "TLSV1_2", "httpsRedirect": False},
                }
            ],
        },
    },
]
