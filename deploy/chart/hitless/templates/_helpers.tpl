{{- define "hitless.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "hitless.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- $name := include "hitless.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "hitless.selector" -}}
app.kubernetes.io/name: {{ include "hitless.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "hitless.labels" -}}
{{ include "hitless.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "hitless.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "hitless.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name: with serviceAccount.create false, name a ServiceAccount" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "hitless.image" -}}
{{- with .Values.image }}
{{- if .digest }}
{{- printf "%s@%s" .repository .digest }}
{{- else }}
{{- printf "%s:%s" .repository (default $.Chart.AppVersion .tag) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Where /metrics is served: IPv6 addresses in brackets; all addresses of both families when none is named. */ -}}
{{- define "hitless.metricsAddress" -}}
{{- with .Values.metrics }}
{{- $host := default "::" .host }}
{{- if contains ":" $host }}
{{- printf "[%s]:%v" $host .port }}
{{- else }}
{{- printf "%s:%v" $host .port }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Where certificates come from, as the agent has it mounted. */ -}}
{{- define "hitless.identity" -}}
{{- with .Values.mesh.identity }}
{{- if eq .source "istio" }}
{{- printf "istio:%s" .istio.address }}
{{- else if eq .source "spiffe" }}
{{- printf "spiffe:/run/spiffe/%s" .spiffe.socketName }}
{{- else }}
{{- printf "%s:/etc/hitless-identity" .source }}
{{- end }}
{{- end }}
{{- end }}

{{- /* The agent's configuration file: what the chart knows, then what the user adds. */ -}}
{{- define "hitless.config" -}}
source: kube
cgroup: /host/cgroup
bpffs: /sys/fs/bpf
state-dir: /run/hitless
metrics-address: {{ include "hitless.metricsAddress" . | quote }}
log-format: {{ .Values.agent.logFormat }}
log-level: {{ .Values.agent.logLevel | quote }}
on-exit: {{ .Values.agent.onExit }}
take-over: true
when-replaced: stand-by
{{- with .Values.mesh }}
mtls: {{ ternary "on" "off" .enabled | quote }}
trust-domain: {{ .trustDomain | quote }}
root-namespace: {{ .rootNamespace | quote }}
local-tls: {{ ternary "on" "off" .localTls | quote }}
{{- if .enabled }}
identity: {{ include "hitless.identity" $ | quote }}
{{- if eq .identity.source "istio" }}
cluster-id: {{ .identity.istio.clusterId | quote }}
{{- end }}
{{- if .policies.configMap }}
policies: /etc/hitless-policies
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.agent.config }}
{{ toYaml . }}
{{- end }}
{{- end }}
