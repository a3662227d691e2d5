variable "name" {
  description = "Name of the farm: what its servers are called and labelled with."
  type        = string
  default     = "drover"
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,18}[a-z0-9]$", var.name))
    error_message = "The name of the farm wants 2 to 20 characters of a-z, 0-9 and -, with a letter first: names of servers begin with it."
  }
}

variable "location" {
  description = "Where the farm stands, such as fsn1."
  type        = string
  validation {
    condition     = contains(["fsn1", "nbg1", "hel1", "ash", "hil", "sin"], var.location)
    error_message = "The location is missing or none of Hetzner: name one of fsn1, nbg1, hel1, ash, hil, sin."
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
  default     = "10.78.0.0/24"
  validation {
    condition     = can(cidrhost(var.cidr, 20)) && can(regex("^(10|172[.](1[6-9]|2[0-9]|3[01])|192[.]168)[.]", var.cidr))
    error_message = "The network wants a private IPv4 range of at least 32 addresses, such as 10.78.0.0/24."
  }
}

variable "image" {
  description = "Image of all servers: Debian 12 or newer, or a snapshot of it."
  type        = string
  default     = "debian-12"
}

variable "ssh" {
  description = "How this machine reaches the servers, to which it brings secrets: a public key, the file of the private one (empty: the agent's), and the IPv4 ranges that may."
  type = object({
    public_key       = string
    private_key_file = optional(string, "")
    from             = list(string)
  })
  validation {
    condition     = can(regex("^(ssh-ed25519|ecdsa-sha2-|ssh-rsa|sk-)", var.ssh.public_key))
    error_message = "The key of ssh wants the text of a public one, such as file(\"~/.ssh/id_ed25519.pub\")."
  }
  validation {
    condition     = var.ssh.private_key_file == "" || try(fileexists(var.ssh.private_key_file), false)
    error_message = "The file of the private key of ssh does not exist; leave it out to use the agent's."
  }
  validation {
    condition     = length(var.ssh.from) > 0 && alltrue([for range in var.ssh.from : can(cidrhost(range, 0)) && range != "0.0.0.0/0"])
    error_message = "Servers get their secrets over ssh: name the IPv4 ranges from which it is open, such as 203.0.113.7/32, and not the whole internet."
  }
}

variable "secrets" {
  description = "Files here with secrets, which are brought over ssh and are in no state and no user data: the Ray token, and variables with the credentials of the bucket."
  type = object({
    ray_token_file = string
    bucket_file    = optional(string, "")
  })
  validation {
    condition     = try(fileexists(var.secrets.ray_token_file), false) && can(regex("^[0-9A-Za-z_-]{32,}\\s*$", file(var.secrets.ray_token_file)))
    error_message = "The file of the Ray token is missing or holds no token: openssl rand -hex 32 > ray-token makes one."
  }
  validation {
    condition     = var.secrets.bucket_file == "" || (try(fileexists(var.secrets.bucket_file), false) && can(regex("AWS_ACCESS_KEY_ID=", file(var.secrets.bucket_file))) && can(regex("AWS_SECRET_ACCESS_KEY=", file(var.secrets.bucket_file))))
    error_message = "The file with the bucket's credentials is missing or lacks a line AWS_ACCESS_KEY_ID=… or AWS_SECRET_ACCESS_KEY=…."
  }
}

variable "object_store" {
  description = "Where the cache's objects lie: s3://BUCKET/PREFIX at an endpoint; without an address on the coordinator's volume."
  type = object({
    url      = optional(string, "")
    endpoint = optional(string, "")
  })
  default = {}
  validation {
    condition     = var.object_store.url == "" || can(regex("^s3://[a-z0-9.-]{3,63}(/.*)?$", var.object_store.url))
    error_message = "The object store wants an address such as s3://my-bucket/farm."
  }
  validation {
    condition     = (var.object_store.url == "") == (var.object_store.endpoint == "") && (var.object_store.endpoint == "" || startswith(var.object_store.endpoint, "https://"))
    error_message = "An object store has both an address and an endpoint with https, such as https://fsn1.your-objectstorage.com."
  }
  validation {
    condition     = (var.object_store.url == "") == (var.secrets.bucket_file == "")
    error_message = "An object store wants the file with its credentials (secrets.bucket_file), and that file an object store."
  }
}

variable "clients" {
  description = "IPv4 ranges from which the farm's HTTP side can be reached without TLS, beside its own network."
  type        = list(string)
  default     = []
  validation {
    condition     = alltrue([for range in var.clients : can(cidrhost(range, 0))])
    error_message = "Each of clients wants to be an IPv4 range, such as 203.0.113.0/24."
  }
  validation {
    condition     = !contains(var.clients, "0.0.0.0/0")
    error_message = "The whole internet as a client would send its token in the clear: set domain, which puts TLS in front."
  }
  validation {
    condition     = length(var.clients) == 0 || var.domain == ""
    error_message = "With a domain clients come through TLS: leave clients out."
  }
}

variable "domain" {
  description = "Name of the farm in the internet, for which Hetzner makes a certificate (its zone stands with Hetzner's DNS): a load balancer with TLS stands in front. Empty: none."
  type        = string
  default     = ""
  validation {
    condition     = var.domain == "" || can(regex("^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?[.])+[a-z]{2,}$", var.domain))
    error_message = "The domain wants a whole name such as farm.example.org."
  }
}

variable "coordinator" {
  description = "The coordinator's server, and its volume in GB."
  type = object({
    server_type = optional(string, "cx33")
    volume_gb   = optional(number, 100)
  })
  default = {}
  validation {
    condition     = var.coordinator.volume_gb >= 10 && var.coordinator.volume_gb <= 10000
    error_message = "The coordinator's volume wants 10 to 10000 GB."
  }
}

variable "workers" {
  description = "Groups of workers, one for each system and size; types that begin with cax are arm64."
  type = map(object({
    server_type = string
    count       = optional(number, 1)
    slots       = optional(number, 0)
    features    = optional(list(string), [])
  }))
  default = {}
  validation {
    condition     = alltrue([for name, group in var.workers : can(regex("^[a-z][a-z0-9-]{0,18}[a-z0-9]$", name))])
    error_message = "Names of worker groups want 2 to 20 characters of a-z, 0-9 and -, with a letter first."
  }
  validation {
    condition     = alltrue([for group in var.workers : can(regex("^(cx|cax|cpx|ccx)[0-9]+$", group.server_type))])
    error_message = "The server type of a group of workers is one of Hetzner's, such as cx43, or cax31 for arm64; there are no Macs."
  }
  validation {
    condition     = alltrue([for group in var.workers : !startswith(group.server_type, "cax") || contains(["fsn1", "nbg1", "hel1"], var.location)])
    error_message = "Hetzner has arm64 servers (cax) in fsn1, nbg1 and hel1 only."
  }
  validation {
    condition     = alltrue([for group in var.workers : group.count >= 0 && group.count <= 50 && floor(group.count) == group.count])
    error_message = "A group of workers has 0 to 50 servers."
  }
}
