variable "name" {
  description = "Name of the Helm release, with which names of objects begin."
  type        = string
  default     = "farm"
  validation {
    condition     = can(regex("^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$", var.name))
    error_message = "The name of the farm wants at most 30 characters of a-z, 0-9 and -, with a letter first: names of pods begin with it."
  }
}

variable "namespace" {
  description = "Namespace of the farm, and whether it is made here."
  type = object({
    name   = optional(string, "builds")
    create = optional(bool, true)
  })
  default = {}
  validation {
    condition     = can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", var.namespace.name)) && !contains(["default", "kube-system", "kube-public"], var.namespace.name)
    error_message = "The namespace wants a name of its own, of at most 63 characters: builds run in it with rights that others should not have."
  }
}

variable "image" {
  description = "Where the images coordinator and worker lie (infra/deploy/images/README.md says how they are built), and by which digests to take them."
  type = object({
    repository = string
    tag        = string
    digests    = optional(object({ coordinator = optional(string, ""), worker = optional(string, "") }), {})
  })
  validation {
    condition     = var.image.repository != "" && var.image.tag != "" && var.image.tag != "latest"
    error_message = "The image wants a repository and one version as its tag, and not latest: Ray wants the same version everywhere."
  }
}

variable "secrets" {
  description = "Names of Secrets of the namespace, made beforehand and never read here, since what Terraform reads it keeps: the farm's own (api-token, upload-secret, cache-key, ray-token), the database's address (key url), the bucket's credentials."
  type = object({
    farm     = string
    database = optional(string, "")
    bucket   = optional(string, "")
  })
  validation {
    condition     = can(regex("^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$", var.secrets.farm))
    error_message = "The farm's secrets are missing: make a Secret with api-token, upload-secret, cache-key and ray-token, and name it as secrets.farm."
  }
}

variable "object_store_url" {
  description = "Where the cache's objects lie, such as s3://my-bucket/farm; empty: on the coordinator's volume."
  type        = string
  default     = ""
  validation {
    condition     = var.object_store_url == "" || can(regex("^(s3|gs|az)://[^/]+", var.object_store_url))
    error_message = "The object store wants an address such as s3://my-bucket/farm."
  }
}

variable "public_url" {
  description = "How clients reach the farm, where an ingress with TLS stands in front; empty: only from inside of the cluster."
  type        = string
  default     = ""
  validation {
    condition     = var.public_url == "" || startswith(var.public_url, "https://")
    error_message = "The public address wants https."
  }
}

variable "standby" {
  description = "A second coordinator that stands by."
  type        = bool
  default     = false
  validation {
    condition     = !var.standby || (var.secrets.database != "" && var.object_store_url != "")
    error_message = "A coordinator stands by on a shared database and object store only: set secrets.database and object_store_url."
  }
}

variable "workers" {
  description = "Groups of workers by name, with the members of the chart's workerDefaults."
  type        = any
  validation {
    condition     = alltrue([for name in keys(var.workers) : can(regex("^[a-z]([a-z0-9-]{0,18}[a-z0-9])?$", name))])
    error_message = "Names of worker groups want at most 20 characters of a-z, 0-9 and -, with a letter first."
  }
  validation {
    condition     = alltrue([for group in values(var.workers) : endswith(try(group.system, "x86_64-linux"), "-linux")])
    error_message = "Pods run Linux: a group's system ends with -linux. Macs join by the module mac-fleet."
  }
  validation {
    condition = alltrue([
      for group in values(var.workers) :
      try(group.minReplicas, 0) <= try(group.replicas, 1) && try(group.replicas, 1) <= try(group.maxReplicas, 10)
    ])
    error_message = "A group of workers wants minReplicas <= replicas <= maxReplicas."
  }
}

variable "settings" {
  description = "Settings of drover beside those that the chart makes (infra/docs/settings.md). The chart refuses names that do not exist."
  type        = any
  default     = {}
}

variable "monitoring" {
  description = "A ServiceMonitor of the Prometheus operator."
  type        = bool
  default     = false
}

variable "values" {
  description = "Further values of the chart, as YAML, each of which goes before those made here."
  type        = list(string)
  default     = []
}

variable "wait" {
  description = "Wait until all pods are ready. A coordinator that stands by never is."
  type        = bool
  default     = false
  validation {
    condition     = !(var.wait && var.standby)
    error_message = "A coordinator that stands by is never ready, so waiting for all pods never ends: leave wait out."
  }
}
