variable "name" {
  description = "Name of the farm: what its resources are called and tagged with."
  type        = string
  default     = "drover"
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,18}[a-z0-9]$", var.name))
    error_message = "The name of the farm wants 2 to 20 characters of a-z, 0-9 and -, with a letter first: names of AWS are made of it."
  }
}

variable "region" {
  description = "Region of AWS, such as eu-central-1."
  type        = string
  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "The region is missing or none of AWS: name one such as eu-central-1."
  }
}

variable "source_url" {
  description = "Address of an archive of drover (tar.gz) that machines fetch."
  type        = string
  validation {
    condition     = startswith(var.source_url, "https://")
    error_message = "The address of drover's archive wants https, because machines run what is in it."
  }
}

variable "source_sha256" {
  description = "Its SHA-256, hexadecimal."
  type        = string
  validation {
    condition     = can(regex("^[0-9a-f]{64}$", var.source_sha256))
    error_message = "The hash of drover's archive wants 64 hexadecimal digits: sha256sum prints them."
  }
}

variable "cidr" {
  description = "Addresses of the farm's own network."
  type        = string
  default     = "10.77.0.0/16"
  validation {
    condition     = can(cidrhost(var.cidr, 0)) && can(regex("/(1[6-9]|2[0-4])$", var.cidr))
    error_message = "The network wants an IPv4 range of /16 to /24, such as 10.77.0.0/16."
  }
}

variable "clients" {
  description = "IPv4 ranges from which the farm's HTTP side can be reached, beside its own network."
  type        = list(string)
  default     = []
  validation {
    condition     = alltrue([for range in var.clients : can(cidrhost(range, 0))])
    error_message = "Each of clients wants to be an IPv4 range, such as 10.0.0.0/8."
  }
  validation {
    condition     = !contains(var.clients, "0.0.0.0/0")
    error_message = "The whole internet as a client would send its token in the clear: set front, which puts TLS there."
  }
}

variable "public_url" {
  description = "How clients reach the farm, where a proxy with TLS stands in front; empty: its private address."
  type        = string
  default     = ""
  validation {
    condition     = var.public_url == "" || startswith(var.public_url, "https://")
    error_message = "The public address wants https."
  }
}

variable "images" {
  description = "Images of machines by architecture (x86_64, arm64, and mac for Macs); empty: the newest Debian 12."
  type        = map(string)
  default     = {}
  validation {
    condition     = alltrue([for name, image in var.images : contains(["x86_64", "arm64", "mac"], name) && startswith(image, "ami-")])
    error_message = "Images are ami-… by x86_64, arm64 or mac."
  }
}

variable "coordinator" {
  description = "The coordinator's machine, its disk in GiB, and its database. With standby there are two in two zones, one of which works, and the Ray head has a machine of its own."
  type = object({
    instance_type  = optional(string, "t3.large")
    standby        = optional(bool, false)
    head_type      = optional(string, "t3.small")
    disk_gb        = optional(number, 50)
    database_class = optional(string, "db.t4g.small")
    database_gb    = optional(number, 20)
  })
  default = {}
  validation {
    condition     = !var.coordinator.standby || var.front != null || var.public_url != ""
    error_message = "Where a coordinator stands by, something must send clients to the one that works: set front, or public_url with a proxy that asks /healthz."
  }
}

variable "front" {
  description = "TLS in front: the farm's name, a certificate of ACM for it, the Route 53 zone for its record (empty: you make it), and whether it is reached from the internet or only from the farm's network and clients."
  type = object({
    domain          = string
    certificate_arn = string
    zone_id         = optional(string, "")
    internal        = optional(bool, false)
  })
  default = null
  validation {
    condition     = var.front == null || can(regex("^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?[.])+[a-z]{2,}$", var.front.domain))
    error_message = "The domain of front wants a whole name such as farm.example.org."
  }
  validation {
    condition     = var.front == null || can(regex("^arn:aws[a-z-]*:acm:${var.region}:[0-9]{12}:certificate/", var.front.certificate_arn))
    error_message = "The certificate of front is an ACM one of the farm's region: arn:aws:acm:REGION:ACCOUNT:certificate/…."
  }
  validation {
    condition     = var.front == null || var.public_url == ""
    error_message = "With front the public address is that of its domain: leave public_url out."
  }
  validation {
    condition     = try(var.front.internal, true) || length(var.clients) == 0
    error_message = "With front everybody comes through TLS: leave clients out, or set front.internal so that only they reach it."
  }
}

variable "cache" {
  description = "The bucket of the cache: deleted with the farm or not, and open to the public or not."
  type = object({
    force_destroy = optional(bool, false)
    public        = optional(bool, false)
  })
  default = {}
  validation {
    condition     = !var.cache.public
    error_message = "The bucket stays private: clients read the cache through the coordinator, which sends them presigned addresses. Leave cache.public out."
  }
}

variable "workers" {
  description = "Groups of Linux workers, one for each system and size."
  type = map(object({
    instance_types = list(string)
    architecture   = optional(string, "x86_64")
    min            = optional(number, 0)
    max            = optional(number, 4)
    desired        = optional(number, 1)
    spot           = optional(bool, false)
    disk_gb        = optional(number, 100)
    slots          = optional(number, 0)
    features       = optional(list(string), [])
  }))
  default = {}
  validation {
    condition     = alltrue([for name, group in var.workers : can(regex("^[a-z][a-z0-9-]{0,18}[a-z0-9]$", name))])
    error_message = "Names of worker groups want 2 to 20 characters of a-z, 0-9 and -, with a letter first."
  }
  validation {
    condition     = alltrue([for group in var.workers : contains(["x86_64", "arm64"], group.architecture)])
    error_message = "The architecture of a group of workers is x86_64 or arm64; Macs stand in macs."
  }
  validation {
    condition     = alltrue([for group in var.workers : group.min <= group.desired && group.desired <= group.max])
    error_message = "A group of workers wants min <= desired <= max."
  }
  validation {
    condition     = alltrue([for group in var.workers : length(group.instance_types) > 0 && (group.spot || length(group.instance_types) == 1)])
    error_message = "A group of workers wants one instance type, or with spot one or more."
  }
  validation {
    condition     = alltrue([for type in flatten([for group in var.workers : group.instance_types]) : !startswith(type, "mac")])
    error_message = "A Mac is no group of workers: it runs on a dedicated host of its own, which macs describes."
  }
}

variable "macs" {
  description = "Macs by name, each on a dedicated host of its own, which AWS bills for 24 hours at least."
  type = map(object({
    instance_type     = string
    availability_zone = string
    dedicated_host    = optional(bool, true)
    slots             = optional(number, 2)
  }))
  default = {}
  validation {
    condition     = alltrue([for mac in var.macs : mac.dedicated_host])
    error_message = "A Mac of EC2 runs on a dedicated host only: leave dedicated_host out, or the Mac."
  }
  validation {
    condition     = alltrue([for mac in var.macs : can(regex("^mac([2-9]|-).*[.]metal$", mac.instance_type))])
    error_message = "The instance type of a Mac is an arm64 one such as mac2.metal: Ray has no release for Intel Macs (mac1.metal)."
  }
  validation {
    condition     = alltrue([for mac in var.macs : startswith(mac.availability_zone, var.region)])
    error_message = "The zone of a Mac lies in the farm's region, such as eu-central-1a; not every zone has Macs."
  }
  validation {
    condition     = length(var.macs) == 0 || contains(keys(var.images), "mac")
    error_message = "Macs want an image with macOS and Nix: name it as images.mac."
  }
}
