"""What a release needs: workflows, versions, the citation, and the packages that `make dist` builds."""
