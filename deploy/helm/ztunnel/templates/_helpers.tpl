{{- define "ztunnel.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "ztunnel.labels" -}}
app.kubernetes.io/name: {{ .component }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: ztunnel
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end -}}

{{/* What selects pods must never change, so it is short. */}}
{{- define "ztunnel.selector" -}}
app.kubernetes.io/name: {{ .component }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- end -}}

{{- define "ztunnel.caAddress" -}}
{{- .Values.certificates.address | default (printf "ztunnel-ca.%s.svc:15012" .Release.Namespace) -}}
{{- end -}}

{{/* Namespaces for the roots besides our own, as JSON. */}}
{{- define "ztunnel.publishTo" -}}
{{- if .Values.ca.publishTo -}}
{{- toJson .Values.ca.publishTo -}}
{{- else if .Values.controller.enabled -}}
["*"]
{{- else -}}
[]
{{- end -}}
{{- end -}}

{{- define "ztunnel.rootsConfigMap" -}}
{{- .Values.certificates.rootsConfigMap | default "ztunnel-ca-root-cert" -}}
{{- end -}}

{{/* Whether the agent must see the host's processes: not empty if so. */}}
{{- define "ztunnel.seesProcesses" -}}
{{- if or .Values.agent.findByProcesses .Values.agent.probes.enabled }}yes{{ end -}}
{{- end -}}

{{/* The agent's settings: what the chart knows, and over it what the operator says. */}}
{{- define "ztunnel.agentConfig" -}}
{{- $known := dict
    "trust_domain" .Values.trustDomain
    "cluster" .Values.cluster
    "cluster_domain" .Values.clusterDomain
    "root_namespace" .Values.rootNamespace
    "drain_seconds" .Values.agent.drainSeconds
    "daemon_set" (printf "%s/ztunnel" .Release.Namespace)
    "sources" (dict "kubernetes" true)
    "pods" (dict "find" "node" "proc_directory" "/proc" "runtime_directory" "/var/run/netns")
    "ca" (dict
      "address" (include "ztunnel.caAddress" .)
      "roots_file" "/var/run/secrets/ztunnel/roots/root-cert.pem"
      "token_file" "/var/run/secrets/tokens/istio-token"
      "leaf_hours" .Values.certificates.leafHours)
    "log" (dict "level" .Values.agent.logLevel "format" .Values.agent.logFormat)
-}}
{{- if .Values.agent.cni.enabled -}}
{{- $_ := set $known "cni" (dict
    "enabled" true
    "plugin" "/opt/ztunnel/ztunnel-cni"
    "bin_directory" "/host/opt/cni/bin"
    "conf_directory" "/host/etc/cni/net.d") -}}
{{- end -}}
{{- if .Values.agent.probes.enabled -}}
{{- $_ := set $known "probes" (dict "enabled" true "cgroup_directory" "/host/sys/fs/cgroup") -}}
{{- end -}}
{{- toYaml (mergeOverwrite $known (deepCopy .Values.agent.settings)) -}}
{{- end -}}

{{- define "ztunnel.caConfig" -}}
{{- $known := dict
    "trust_domain" .Values.trustDomain
    "agents" (list (printf "%s/ztunnel" .Release.Namespace))
    "leaf_hours" .Values.certificates.leafHours
    "listen" (dict "names" (list
      (printf "ztunnel-ca.%s.svc" .Release.Namespace)
      (printf "ztunnel-ca.%s.svc.%s" .Release.Namespace .Values.clusterDomain)))
    "root" (dict "spread_hours" .Values.ca.spreadHours)
    "log" (dict "level" .Values.ca.logLevel "format" .Values.ca.logFormat)
-}}
{{- if .Values.ca.rootSecret -}}
{{- $_ := set $known.root "given" "/var/run/secrets/ztunnel/root" -}}
{{- end -}}
{{- with include "ztunnel.publishTo" . | fromJsonArray -}}
{{- $_ := set $known "publish" (dict "namespaces" (concat (list $.Release.Namespace) . | uniq)) -}}
{{- end -}}
{{- toYaml (mergeOverwrite $known (deepCopy .Values.ca.settings)) -}}
{{- end -}}

{{- define "ztunnel.controllerConfig" -}}
{{- $known := dict
    "trust_domain" .Values.trustDomain
    "cluster_domain" .Values.clusterDomain
    "root_namespace" .Values.rootNamespace
    "gateways" (dict
      "image" (include "ztunnel.image" .)
      "pull_policy" .Values.image.pullPolicy
      "ca_address" (include "ztunnel.caAddress" .)
      "roots_config_map" (include "ztunnel.rootsConfigMap" .))
    "nodes" (dict "taints" .Values.controller.taints)
    "log" (dict "level" .Values.controller.logLevel "format" .Values.controller.logFormat)
-}}
{{- toYaml (mergeOverwrite $known (deepCopy .Values.controller.settings)) -}}
{{- end -}}
