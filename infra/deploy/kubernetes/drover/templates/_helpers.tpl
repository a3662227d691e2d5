{{- define "drover.labels" -}}
app.kubernetes.io/name: drover
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "drover.selector" -}}
app.kubernetes.io/name: drover
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- /* `part` is coordinator or worker. A digest names one content for good, also where a tag is moved. */ -}}
{{- define "drover.image" -}}
{{- $digest := get .root.Values.image.digests .part -}}
{{ .root.Values.image.repository }}/{{ .part }}:{{ .root.Values.image.tag }}{{ if $digest }}@{{ $digest }}{{ end }}
{{- end -}}

{{- /* What contradicts itself is said before anything is applied. */ -}}
{{- define "drover.check" -}}
{{- if not .Values.image.repository }}{{ fail "image.repository is empty: name where the images coordinator and worker lie" }}{{ end -}}
{{- if not .Values.image.tag }}{{ fail "image.tag is empty: name one version, which all pods of a farm share" }}{{ end -}}
{{- if eq (toString .Values.image.tag) "latest" }}{{ fail "image.tag is latest: name one version, because Ray wants the same everywhere" }}{{ end -}}
{{- if not .Values.secretName }}{{ fail "secretName is empty: make a Secret with api-token, upload-secret, cache-key and ray-token, and name it" }}{{ end -}}
{{- if gt (len .Release.Name) 30 }}{{ fail (printf "the release's name %s has more than 30 characters, and names of pods begin with it: choose a shorter one" .Release.Name) }}{{ end -}}
{{- if and (gt (int .Values.coordinator.replicas) 1) (not .Values.database.secretName) }}{{ fail "coordinator.replicas is 2 without database.secretName: a coordinator stands by on a shared PostgreSQL only" }}{{ end -}}
{{- if and (gt (int .Values.coordinator.replicas) 1) (not .Values.objectStore.url) }}{{ fail "coordinator.replicas is 2 without objectStore.url: both coordinators must see the same objects" }}{{ end -}}
{{- range $name, $given := .Values.workers -}}
{{- $group := mergeOverwrite (deepCopy $.Values.workerDefaults) $given -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]{0,18}[a-z0-9])?$" $name) }}{{ fail (printf "workers.%s is no name of a group: at most 20 of a-z, 0-9 and -, with a letter first" $name) }}{{ end -}}
{{- if not (hasSuffix "-linux" $group.system) }}{{ fail (printf "workers.%s.system is %s: pods run Linux; Macs join by themselves (infra/docs/from_nothing.md)" $name $group.system) }}{{ end -}}
{{- if or (lt (int $group.replicas) (int $group.minReplicas)) (gt (int $group.replicas) (int $group.maxReplicas)) }}{{ fail (printf "workers.%s.replicas is %d, which is not between minReplicas %d and maxReplicas %d" $name (int $group.replicas) (int $group.minReplicas) (int $group.maxReplicas)) }}{{ end -}}
{{- end -}}
{{- end -}}

{{- /* The address inside of the cluster: a service whose address stays, because Ray's nodes keep the head's. */ -}}
{{- define "drover.head" -}}
{{ .Release.Name }}-head.{{ .Release.Namespace }}.svc:6379
{{- end -}}

{{- define "drover.settings" -}}
{{- $here := dict "host" "0.0.0.0" "port" 7878 "secrets_dir" "/run/drover" "ray_address" (include "drover.head" .) -}}
{{- $_ := set $here "public_url" (default (printf "http://%s-coordinator.%s.svc:7878" .Release.Name .Release.Namespace) .Values.publicUrl) -}}
{{- if .Values.objectStore.url }}{{ $_ := set $here "object_store_url" .Values.objectStore.url }}{{ end -}}
{{- /* Helm reads numbers of values as fractions; whole ones are written as such. */ -}}
{{- mergeOverwrite $here (deepCopy .Values.settings) | toToml | replace ".0\n" "\n" -}}
{{- end -}}

{{- /* Files of a Secret are links that others of the group may read; drover wants plain files of its own. */ -}}
{{- define "drover.secretsInit" -}}
- name: secrets
  image: {{ include "drover.image" . }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  command: ["sh", "-c", "umask 077 && cp -L /run/given/* /run/drover/"]
  securityContext:
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities: {drop: [ALL]}
    seccompProfile: {type: RuntimeDefault}
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {memory: 64Mi}
  volumeMounts:
    - {name: given, mountPath: /run/given, readOnly: true}
    - {name: secrets, mountPath: /run/drover}
{{- end -}}

{{- define "drover.secretsVolumes" -}}
- name: given
  secret:
    secretName: {{ .root.Values.secretName }}
    defaultMode: {{ .mode }}
    items:
{{- range .files }}
      - {key: {{ . }}, path: {{ . }}}
{{- end }}
- name: secrets
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
{{- end -}}

{{- define "drover.hardened" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "drover.podIp" -}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
{{- end -}}
