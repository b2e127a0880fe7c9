//! Names that clients give services: `web.mesh`.

use super::ServiceName;

/// Domains of names that are services, the longer first.
const DOMAINS: [&str; 2] = [".mesh.internal", ".mesh"];

/// `web.mesh` and `web.mesh.internal` are the service `web`, in any case, with or without the
/// closing dot.
pub fn service_of(host: &[u8]) -> Option<ServiceName> {
    let host = std::str::from_utf8(host).ok()?.to_ascii_lowercase();
    let host = host.strip_suffix('.').unwrap_or(&host);
    let name = DOMAINS.iter().find_map(|domain| host.strip_suffix(domain))?;
    ServiceName::try_new(name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_the_mesh_are_services() {
        for good in ["web.mesh", "WEB.Mesh", "web.mesh.", "web.mesh.internal", "web.mesh.internal."]
        {
            assert_eq!(service_of(good.as_bytes()).unwrap().as_str(), "web", "{good}");
        }
        for bad in [
            "web",
            "example.com",
            "a.web.mesh",
            ".mesh",
            "mesh",
            "web.mesh.example.com",
            "node.mesh",
            "w\0b.mesh",
        ] {
            assert!(service_of(bad.as_bytes()).is_none(), "{bad}");
        }
    }
}
